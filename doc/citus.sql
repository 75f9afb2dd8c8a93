-- Distributes the tables over the workers of Citus. Optional: without it they are
-- ordinary tables of the coordinator. Once, on the coordinator, as the owner of
-- the tables, after the server has made them at its first start, with all
-- servers stopped (rows that are there are moved):
--
--   psql -v ON_ERROR_STOP=1 -f doc/citus.sql "$DATABASE_URL"
--
-- DATABASE_URL goes on to name the coordinator. The extension is a superuser's to
-- make, and the workers are to be added, before: create extension citus;
-- select citus_add_node('worker-1', 5432); …

-- All of a session is on one worker: each of its statements and commits is that
-- worker's alone, and deleting it is a cascade there. While a worker is away the
-- sessions of the others go on being recorded.
select create_distributed_table('sessions', 'session_id');
select create_distributed_table('session_events', 'session_id', colocate_with => 'sessions');
select create_distributed_table('session_errors', 'session_id', colocate_with => 'sessions');

-- The table servers stays the coordinator's own: a few rows, written every two
-- seconds by each server, joined with nothing. A reference table would be written
-- on every worker, and no server could say that it is there while one is away.

-- These ask all workers, and fail while one is away: the lists (GET /sessions and
-- /sessions/active), the sums of /health, a user's sessions; every ten seconds
-- of each server, the sessions that nobody records; at each cleanup, those
-- that are over. What is recorded, watched, replayed or exported by its id asks one.
