-- The schema, applied at every start, in one transaction under an advisory
-- lock. Every key but that of servers contains session_id, which is never updated,
-- so that the tables can be distributed by it.

create table if not exists sessions (
    session_id       text primary key,
    user_id          text not null,
    url              text not null,
    metadata         json not null,            -- as the page sent it; jsonb refuses \u0000
    is_active        boolean not null,
    created_at       timestamptz not null default now(),
    updated_at       timestamptz not null default now(),
    ended_at         timestamptz,
    event_count      bigint not null default 0,
    error_count      bigint not null default 0,
    raw_bytes        bigint not null default 0, -- JSON of its events and errors
    stored_bytes     bigint not null default 0, -- the chunks, and JSON of the errors
    first_event_time bigint,                    -- least and greatest timestamp of
    last_event_time  bigint,                    -- its events, in milliseconds
    snapshot_index   bigint,                    -- number of the newest full snapshot
    last_seq         bigint not null default 0, -- highest batch number that is stored
    resume_hash      bytea,                     -- SHA-256 of the token that continues it
    server           text not null default '',  -- which of the servers records it, or did last
    page             bigint not null default 0, -- which page of its tab; an earlier one does not get it back
    watched_at       timestamptz,               -- when a server last said that it is watched there
    -- Raised by each claim; writes of an older one are refused. It begins at the
    -- time in microseconds: a row made again after its deletion has a higher one.
    epoch            bigint not null default extract(epoch from clock_timestamp()) * 1000000
) with (fillfactor = 80);                       -- room for updates in place

-- These columns were added later. Altered only if need be, for the reason below. url_lower is
-- what a search for a part of the URL reads: 100,000 rows in half the time that lower()
-- would take. length is the duration of a session that has ended, null if it has
-- no event. Of a live one it is null too: a column that an index has and that
-- changes with each batch would end the updates in place.
do $$ begin
    if (select count(*) < 3 from pg_attribute
        where attrelid = 'sessions'::regclass and attname in ('server', 'page', 'watched_at')) then
        alter table sessions add column if not exists server text not null default '',
            add column if not exists page bigint not null default 0, add column if not exists watched_at timestamptz;
    end if;
    if not exists (select from pg_attribute where attrelid = 'sessions'::regclass and attname = 'length') then
        alter table sessions add column length bigint
            generated always as (case when not is_active and event_count > 0
                then coalesce(last_event_time - first_event_time, 0) end) stored,
            add column url_lower text generated always as (lower(url collate "C")) stored;
    end if;
end $$;

-- A search by time, URL or state reads sessions_found, and the rows of the page that it gives.
drop index if exists sessions_created, sessions_past;
create index if not exists sessions_found on sessions (created_at desc, session_id) include (is_active, url_lower, length);
create index if not exists sessions_user on sessions (user_id, created_at desc);
create index if not exists sessions_errors on sessions (created_at desc, session_id) where error_count > 0;
create index if not exists sessions_active on sessions (created_at desc) where is_active;
create index if not exists sessions_ended on sessions (ended_at) where not is_active;
create index if not exists sessions_watched on sessions (server, watched_at) where watched_at is not null;

create table if not exists session_events (
    session_id     text not null references sessions on delete cascade,
    first_index    bigint not null,             -- number of the chunk's first event
    event_count    integer not null,
    start_time     bigint,                      -- least and greatest timestamp
    end_time       bigint,
    snapshot_index bigint,                      -- newest full snapshot in the chunk
    raw_bytes      integer not null,
    events         bytea not null,              -- gzipped JSON array
    primary key (session_id, first_index)
);

-- Altered only if need be: that waits for all who read the table, a backup say, and
-- makes writers wait behind it.
do $$ begin
    if (select attstorage from pg_attribute where attrelid = 'session_events'::regclass and attname = 'events') <> 'e' then
        alter table session_events alter column events set storage external;
    end if;
end $$;

create table if not exists session_errors (
    session_id text not null references sessions on delete cascade,
    id         bigint not null,                 -- 0, 1, 2… within the session
    kind       text not null,
    error_data json not null,
    created_at timestamptz not null default now(),
    primary key (session_id, id)
);

-- The servers that share this database; each says now and then that it is there.
create table if not exists servers (
    server  text primary key,
    seen_at timestamptz not null default now()
);
