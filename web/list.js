// The list of sessions: live ones, which update by themselves, then the others,
// a page at a time.

import { clock, connect, count, el, getJSON, inWaiting, offerSignOut, patiently, place, when, words } from './api.js';

const PAGE = 50;
const LIVE_SHOWN = 200; // a table longer than this is no overview
const REFRESH = 5000; // counts and durations of live sessions
const $ = Object.fromEntries([...document.querySelectorAll('[id]')].map((node) => [node.id, node]));
const rows = { live: new Map(), past: new Map() };
let offset = Number(new URLSearchParams(location.search).get('offset')) || 0;

const note = (text) => { $.note.textContent = text; };
const onWait = (ms) => note(ms ? inWaiting(ms) : '');

const failed = (err) => note(`The list cannot be loaded: ${err.message}`);

function makeRow(session) {
  const link = el('a', { href: `/view/${encodeURIComponent(session.sessionId)}` });
  return el('tr', {}, el('td'), el('td', {}, link), el('td'), el('td'), el('td'), el('td'));
}

function fillRow(row, { userId, metadata, eventCount, errorCount, startTime, endTime, createdAt }) {
  const [user, page, started, duration, events, errors] = row.cells;
  const texts = [
    [user, userId], [page.firstChild, place(metadata?.url)], [started, when(createdAt)],
    [duration, clock(endTime - startTime)], [events, count(eventCount)], [errors, count(errorCount)],
  ];
  for (const [node, text] of texts) if (node.textContent !== text) node.textContent = text;
  page.title = words(metadata?.url);
  user.title = words(userId);
  errors.className = errorCount > 0 ? 'bad' : '';
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

async function refreshLive() {
  const { sessions } = await patiently(() => getJSON('/sessions/active'), onWait);
  show('live', sessions.slice(0, LIVE_SHOWN));
  $['live-count'].textContent = sessions.length > 0 ? `(${count(sessions.length)})` : '';
  $['more-live'].hidden = sessions.length <= LIVE_SHOWN;
  $['more-live'].textContent = `The newest ${LIVE_SHOWN} are shown.`;
  showParts();
}

// One more than a page is asked for: it tells whether there is a next page.
async function refreshPast() {
  const path = `/sessions?active=false&limit=${PAGE + 1}&offset=${offset}`;
  const { sessions } = await patiently(() => getJSON(path), onWait);
  const past = sessions.slice(0, PAGE);
  show('past', past);
  $.range.textContent = past.length > 0 ? `${count(offset + 1)} – ${count(offset + Math.min(sessions.length, PAGE))}` : 'No more';
  $.newer.disabled = offset === 0;
  $.older.disabled = sessions.length <= PAGE;
  $.pages.hidden = $.newer.disabled && $.older.disabled;
  showParts();
}

function showParts() {
  $['live-part'].hidden = rows.live.size === 0;
  $['past-part'].hidden = rows.past.size === 0 && offset === 0;
  $.empty.hidden = !($['live-part'].hidden && $['past-part'].hidden);
}

function turn(by) {
  offset = Math.max(0, offset + by * PAGE);
  history.replaceState(null, '', offset > 0 ? `/?offset=${offset}` : '/');
  return refreshPast().catch(failed);
}

// Several sessions that start or end at once cost one request.
let soon;
function refreshSoon() {
  soon ??= setTimeout(() => {
    soon = undefined;
    Promise.all([refreshLive(), refreshPast()]).catch(failed);
  }, 300);
}

// What is told at once is in the database a moment later, at times after the
// first look.
function receive(type) {
  if (!['session_started', 'session_ended'].includes(type)) return;
  refreshSoon();
  setTimeout(refreshSoon, 2000);
}

async function start() {
  $.tag.textContent = `<script src="${location.origin}/tracker.js" async></script>`;
  $.newer.onclick = () => turn(-1);
  $.older.onclick = () => turn(1);
  await Promise.all([refreshLive(), refreshPast()]);
  note('');
  connect({ onOpen: refreshSoon, onMessage: receive, onWait });
  setInterval(() => { if (!document.hidden && rows.live.size > 0) refreshLive().catch(failed); }, REFRESH);
}

offerSignOut($.signout);
start().catch(failed);
