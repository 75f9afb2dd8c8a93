// The list of sessions: live ones, which update by themselves, then the others,
// a page at a time. What is looked for stands in the page's query string, with
// the names that the API has.

import {
  $, ago, browser, clock, connect, copied, count, el, getJSON, inWaiting, offerSignOut, patiently, person, place,
  remove, when, words, write,
} from './api.js';

const PAGE = 50;
const LIVE_SHOWN = 200; // a table longer than this is no overview
const REFRESH = 5000;
const TYPING = 300;
const rows = { live: new Map(), past: new Map() };
const { elements: fields } = $.form;
let asked = new URLSearchParams(location.search);
let soon; // the next look, if there is news

const note = (text) => write($.note, text);
const onWait = (ms) => note(ms ? inWaiting(ms) : '');

// Rows.

const STATES = { live: 'Live', hidden: 'In background', left: 'Left' };

// lastPage is where a visit went, without the host that it began on.
function lastPage({ url, lastUrl }) {
  const [first, last] = [place(url), place(lastUrl ?? url)];
  const host = `${first.split('/')[0]}/`;
  return first === last ? '' : ` → ${last.startsWith(host) ? last.slice(host.length - 1) : last}`;
}

const told = (n) => (Number.isFinite(n) ? count(n) : '');

// fillRow fills what is marked in the row of the page's template, in its order.
function fillRow(row, session) {
  const { sessionId, userId, errorCount, startTime, endTime, createdAt, isActive, state = 'live' } = session;
  const meta = session.metadata ?? {}, parts = row.querySelectorAll('[data-part]');
  const [user, where, first, last, started, length, pages, clicks, errors, agent] = parts;
  user.href = `/?userId=${encodeURIComponent(userId)}`;
  user.title = words(userId);
  write(user, person(userId));
  where.href = `/view/${encodeURIComponent(sessionId)}`;
  where.title = [meta.url, meta.lastUrl].map(words).filter(Boolean).join(' → ');
  write(first, place(meta.url));
  write(last, lastPage(meta));
  started.className = isActive ? `state ${state}` : '';
  started.title = when(createdAt);
  write(started, isActive ? STATES[state] : ago(createdAt));
  write(length, clock(endTime - startTime));
  write(pages, told(meta.pages));
  write(clicks, told(meta.clicks));
  write(errors, errorCount > 0 ? count(errorCount) : '');
  agent.title = words(meta.userAgent);
  write(agent, browser(meta.userAgent));
}

// show keeps the rows of sessions that stay, so that neither focus nor a
// selection is lost when the list updates.
function show(name, sessions) {
  const old = rows[name], row = $.row.content.firstElementChild;
  const now = new Map(sessions.map(({ sessionId: id }) => [id, old.get(id) ?? row.cloneNode(true)]));
  for (const s of sessions) fillRow(now.get(s.sessionId), s);
  if ([...old.keys()].join() !== [...now.keys()].join()) $[name].replaceChildren(...now.values());
  rows[name] = now;
}

// Questions.

const FILTERS = ['userId', 'url', 'from', 'to', 'minDuration', 'errors', 'active'];
const filtered = () => FILTERS.some((name) => asked.get(name));
const offset = () => Number(asked.get('offset')) || 0;

// query makes the API's question. A date is the whole day, where the reader is.
function query(active, limit, from) {
  const question = new URLSearchParams({ active, limit, offset: from });
  for (const name of FILTERS) {
    const value = asked.get(name);
    const day = /^\d{4}-\d\d-\d\d$/.test(value) && new Date(`${value}T${name === 'to' ? '23:59:59.999' : '00:00'}`);
    if (value && name !== 'active') question.set(name, day ? day.getTime() : value);
  }
  return `/sessions?${question}`;
}

function load(active, limit, from) {
  if (asked.get('active') === String(!active)) return { sessions: [], total: 0 };
  return patiently(() => getJSON(query(active, limit, from)), onWait);
}

async function refresh() {
  const mine = asked;
  soon = undefined;
  try {
    const [live, past] = await Promise.all([load(true, LIVE_SHOWN, 0), load(false, PAGE, offset())]);
    if (mine === asked) fill(live, past); // otherwise something else is looked for by now
  } catch (err) {
    note(`The list cannot be loaded: ${err.message}`);
  }
}

const all = ({ total, totalIsMore }) => `${count(total)}${totalIsMore ? '+' : ''}`;

function fill(live, past) {
  const from = offset(), to = from + past.sessions.length, isNone = from === 0 && live.total + past.total === 0;
  show('live', from > 0 ? [] : live.sessions);
  show('past', past.sessions);
  write($.range, `${to > from ? `${count(from + 1)} – ${count(to)}` : 'No more'} of ${all(past)}`);
  write($['live-count'], `${all(live)} live`);
  document.title = live.total > 0 ? `● ${count(live.total)} · Sessions` : 'Sessions';
  $.newer.disabled = from === 0;
  $.older.disabled = !past.hasMore;
  $.pages.hidden = past.total === 0;
  $['live-count'].hidden = live.total === 0;
  $.sessions.hidden = isNone;
  $.nothing.hidden = !isNone || !filtered();
  $.empty.hidden = !isNone || filtered();
  $['tag-card'].popover = $.empty.hidden ? 'auto' : null; // in the page, where there is nothing else
}

// Filters.

// search takes what is asked for into the page's address and looks anew.
function search(params) {
  asked = new URLSearchParams([...params].filter(([, value]) => value !== ''));
  history.replaceState(null, '', `/${asked.size > 0 ? `?${asked}` : ''}`);
  showFilters();
  return refresh();
}

function turnPage(by) {
  asked.set('offset', offset() + by * PAGE);
  if (offset() <= 0) asked.delete('offset');
  return search(asked);
}

function showFilters() {
  for (const name of FILTERS) {
    if (fields[name].type === 'checkbox') fields[name].checked = asked.get(name) === 'true';
    else if (document.activeElement !== fields[name]) fields[name].value = asked.get(name) ?? '';
  }
  const userId = asked.get('userId');
  $.clear.hidden = !filtered();
  $['of-user'].hidden = !userId;
  write($.user, person(userId));
  $.export.href = `/sessions/export?userId=${encodeURIComponent(userId)}`;
}

async function removeUser() {
  const userId = asked.get('userId');
  const question = `Delete all sessions of ${words(userId)}, also those that the other filters hide?`;
  const answer = await remove(`/sessions?userId=${encodeURIComponent(userId)}`, question, note);
  if (!answer) return;
  const { deletedCount } = await answer.json();
  await search([]);
  note(`Sessions deleted: ${count(deletedCount)}.`);
}

function controls() {
  let typing;
  const searchIn = (ms) => {
    clearTimeout(typing);
    typing = setTimeout(() => search(new FormData($.form)), ms);
  };
  $.form.onsubmit = (e) => { e.preventDefault(); searchIn(0); };
  $.form.oninput = () => searchIn(TYPING);
  $.filter.open = filtered(); // on a narrow page; on a wide one it always is
  $.newer.onclick = () => turnPage(-1);
  $.older.onclick = () => turnPage(1);
  $.delete.onclick = removeUser;
  $['copy-tag'].onclick = async () => note(await copied($.tag.textContent) ? 'The tag is copied.' : '');
}

// News.

// Several sessions that start or end at once cost one request. What is told at once
// may be in the database a moment later: the next look finds it.
function receive(type) {
  if (type === 'session_started' || type === 'session_ended') soon ??= setTimeout(refresh, 300);
}

// The server counts who fetched tracker.js, and what came of it.
const REFUSALS = {
  ingest_key: 'data-key is missing or is not INGEST_KEY', origin: 'TRACKER_ORIGINS does not have this origin',
};

async function tellUnrecorded() {
  const { trackerFetches = [] } = await getJSON('/stats').catch(() => ({}));
  const silent = trackerFetches.filter(({ sessions }) => sessions === 0).slice(0, 5);
  for (const { origin, fetches, refusals } of silent) {
    const reasons = Object.entries(refusals ?? {})
      .map(([why, n]) => ` Refused (${count(n)}×): ${REFUSALS[why] ?? why}.`);
    const came = `Pages of ${origin} fetched tracker.js (${count(fetches)}×) in the last hour; no session came of it.`;
    $.unrecorded.append(el('li', { textContent: came + reasons.join('') }));
  }
  $.unrecorded.hidden = silent.length === 0;
}

async function start() {
  controls();
  showFilters();
  await refresh();
  if ($.note.textContent === 'Loading…') note('');
  connect({ onOpen: refresh, onMessage: receive, onWait });
  refreshLater();
  tellUnrecorded();
}

// refreshLater waits for an answer before it asks again: the server may be away.
const refreshLater = () => setTimeout(async () => {
  if (!document.hidden) await refresh();
  refreshLater();
}, REFRESH);

function sayTag({ ingestKey }) {
  const { origin } = location, key = ingestKey?.replaceAll('&', '&amp;').replaceAll('"', '&quot;');
  write($.tag, `<script src="${origin}/tracker.js"${key ? ` data-key="${key}"` : ''} async></script>`);
  write($.csp, `script-src ${origin}; connect-src ${origin} ${origin.replace('http', 'ws')}`);
}

sayTag({});
offerSignOut().then(sayTag);
start();
