// The list of sessions: live ones, which update by themselves, then the others,
// a page at a time. What is looked for stands in the page's query string, with
// the names that the API has.

import {
  $, ago, browser, clock, connect, copied, count, el, getJSON, inWaiting, offerSignOut, patiently, person, place,
  request, when, words, write,
} from './api.js';

const PAGE = 50;
const LIVE_SHOWN = 200; // a table longer than this is no overview
const REFRESH = 5000; // of live sessions
const TYPING = 300;
const rows = { live: new Map(), past: new Map() };
const { elements: fields } = $.form;
let asked = new URLSearchParams(location.search);
let turn = 0; // raised by each new search: answers to an older one are late

const note = (text) => write($.note, text);
const onWait = (ms) => note(ms ? inWaiting(ms) : '');
const failed = (err) => note(`The list cannot be loaded: ${err.message}`);

// Rows.

const STATES = { live: 'Live', hidden: 'In background', left: 'Left' };

function makeRow({ sessionId }) {
  const where = el('a', { href: `/view/${encodeURIComponent(sessionId)}` }, el('span'), el('span'));
  const cell = (className, ...children) => el('td', { className }, ...children);
  return el('tr', {}, el('th', { scope: 'row' }, el('a')), cell('', where), cell(''), cell(''),
    cell('pages'), cell('clicks'), cell('errors', el('span')), cell(''));
}

// lastPage is where a visit went, without the host that it began on.
function lastPage({ url, lastUrl }) {
  const [first, last] = [place(url), place(lastUrl ?? url)];
  const host = `${first.split('/')[0]}/`;
  return first === last ? '' : ` → ${last.startsWith(host) ? last.slice(host.length - 1) : last}`;
}

const told = (n) => (Number.isFinite(n) ? count(n) : '');

function fillRow(row, session) {
  const { userId, errorCount, startTime, endTime, createdAt, isActive, state = 'live' } = session;
  const meta = session.metadata ?? {}, [who, where, started, ...others] = row.cells;
  const [user] = who.children, [first, last] = where.firstChild.children;
  write(user, person(userId));
  write(first, place(meta.url));
  write(last, lastPage(meta));
  write(started, isActive ? STATES[state] : ago(createdAt));
  const errors = errorCount > 0 ? count(errorCount) : '';
  const texts = [clock(endTime - startTime), told(meta.pages), told(meta.clicks), errors, browser(meta.userAgent)];
  others.forEach((cell, i) => write(cell.firstChild?.nodeType === 1 ? cell.firstChild : cell, texts[i]));
  Object.assign(user, { href: `/?userId=${encodeURIComponent(userId)}`, title: words(userId) });
  where.title = [meta.url, meta.lastUrl].map(words).filter(Boolean).join(' → ');
  started.title = when(createdAt);
  started.className = isActive ? `state ${state}` : '';
  others.at(-1).title = words(meta.userAgent);
}

// show keeps the rows of sessions that stay, so that neither focus nor a
// selection is lost when the list updates.
function show(name, sessions) {
  const old = rows[name];
  const now = new Map(sessions.map((s) => [s.sessionId, old.get(s.sessionId) ?? makeRow(s)]));
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

async function load(active, limit, from) {
  const mine = turn;
  if (asked.get('active') === String(!active)) return { sessions: [], total: 0 };
  const answer = await patiently(() => getJSON(query(active, limit, from)), onWait);
  return mine === turn ? answer : null;
}

const known = { live: 0, past: 0 };

async function refreshLive() {
  const answer = await load(true, LIVE_SHOWN, 0);
  if (!answer) return;
  const n = known.live = answer.total ?? answer.sessions.length;
  show('live', offset() > 0 ? [] : answer.sessions);
  $['live-count'].hidden = n === 0;
  write($['live-count'], `${count(n)}${answer.totalIsMore ? '+' : ''} live`);
  document.title = n > 0 ? `● ${count(n)} · Sessions` : 'Sessions';
  showParts();
}

async function refreshPast() {
  const answer = await load(false, PAGE, offset());
  if (!answer) return;
  const { sessions, total = 0, totalIsMore, hasMore } = answer;
  known.past = total;
  show('past', sessions);
  const shown = sessions.length > 0 ? `${count(offset() + 1)} – ${count(offset() + sessions.length)}` : 'No more';
  write($.range, `${shown} of ${count(total)}${totalIsMore ? '+' : ''}`);
  $.newer.disabled = offset() === 0;
  $.older.disabled = !hasMore;
  $.pages.hidden = total === 0;
  showParts();
}

function showParts() {
  const none = known.live + known.past === 0 && offset() === 0;
  $.sessions.hidden = none;
  $.nothing.hidden = !none || !filtered();
  $.empty.hidden = !none || filtered();
  $['tag-card'].hidden = $.empty.hidden && $.record.getAttribute('aria-expanded') === 'false';
}

// Filters.

// search takes what is asked for into the page's address and looks anew.
function search(params) {
  asked = new URLSearchParams([...params].filter(([name, value]) => value !== '' && (name !== 'offset' || value !== '0')));
  history.replaceState(null, '', `/${asked.size > 0 ? `?${asked}` : ''}`);
  turn++;
  showFilters();
  return refresh();
}

const refresh = () => Promise.all([refreshLive(), refreshPast()]).catch(failed);

function turnPage(by) {
  asked.set('offset', Math.max(0, offset() + by * PAGE));
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
  const which = 'also those that match no other filter? They cannot be brought back.';
  if (!confirm(`Delete all sessions of ${words(userId)}, ${which}`)) return;
  try {
    const answer = await request(`/sessions?userId=${encodeURIComponent(userId)}`, { method: 'DELETE' });
    const { deletedCount } = await answer.json();
    await search([]);
    note(`Sessions deleted: ${count(deletedCount)}.`);
  } catch (err) {
    note(`They were not deleted: ${err.message}`);
  }
}

function controls() {
  let typing;
  const searchIn = (ms) => {
    clearTimeout(typing);
    typing = setTimeout(() => search(new FormData($.form)), ms);
  };
  $.form.onsubmit = (e) => { e.preventDefault(); searchIn(0); };
  $.form.onchange = () => searchIn(0);
  $.form.oninput = () => searchIn(TYPING);
  $.clear.onclick = (e) => { e.preventDefault(); search([]); };
  const wide = matchMedia('(min-width: 52rem)'); // a narrow page folds the filters away
  const unfold = () => { $.filter.open ||= wide.matches || filtered(); };
  wide.onchange = unfold;
  unfold();
  $.newer.onclick = () => turnPage(-1);
  $.older.onclick = () => turnPage(1);
  $.delete.onclick = removeUser;
  $.record.onclick = () => {
    $.record.setAttribute('aria-expanded', $.record.getAttribute('aria-expanded') === 'false');
    showParts();
  };
  $['copy-tag'].onclick = async () => note(await copied($.tag.textContent) ? 'The tag is copied.' : '');
}

// News.

// Several sessions that start or end at once cost one request.
let soon;
function refreshSoon() {
  soon ??= setTimeout(() => {
    soon = undefined;
    refresh();
  }, 300);
}

// What is told at once is in the database a moment later, at times after the
// first look.
function receive(type) {
  if (!['session_started', 'session_ended'].includes(type)) return;
  refreshSoon();
  setTimeout(refreshSoon, 2000);
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
      .map(([why, n]) => ` Refused ${count(n)} times: ${REFUSALS[why] ?? why}.`);
    const came = `Pages of ${origin} fetched tracker.js ${count(fetches)} times in the last hour; no session came.`;
    $.unrecorded.append(el('li', { textContent: came + reasons.join('') }));
  }
  $.unrecorded.hidden = silent.length === 0;
}

async function start() {
  controls();
  showFilters();
  await refresh();
  if ($.note.textContent === 'Loading…') note('');
  connect({ onOpen: refreshSoon, onMessage: receive, onWait });
  refreshLater();
  tellUnrecorded();
}

// refreshLater waits for an answer before it asks again: the server may be away.
const refreshLater = () => setTimeout(async () => {
  if (!document.hidden && rows.live.size > 0) await refreshLive().catch(failed);
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
