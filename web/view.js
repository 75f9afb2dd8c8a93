// The page of one session: what it is, its player, its errors.

import { clock, connect, count, el, getJSON, HttpError, inWaiting, offerSignOut, patiently, place, request, when, words } from './api.js';
import { Cleaner } from './events.js';
import { Player } from './player.js';
import { Recording } from './recording.js';

const $ = Object.fromEntries([...document.querySelectorAll('[id]')].map((node) => [node.id, node]));
const id = decodeURIComponent(location.pathname.split('/').at(-1));
const recording = new Recording(id, waiting);
const marks = new Map(); // by kind and time: a piece that is loaded twice marks once
const MARKS = 2000; // no more than anyone can tell apart
const SCAN_BYTES = 4 << 20, SCAN_CHUNKS = 300;
const STEP = 5000;
let player, feed, shownTime = 0;

// Words: the message stands in the stage instead of a picture, the note below it.

function message(text, ...more) {
  if ($.message.firstChild?.textContent === text) return;
  $.message.replaceChildren(text, ...more);
  $.message.hidden = !text;
}

function note(text) { if ($.note.textContent !== text) $.note.textContent = text; }

function waiting(ms) { note(ms ? inWaiting(ms) : 'Connected again.'); }

function failed(err) {
  const gone = err instanceof HttpError && err.status === 404;
  const text = gone ? 'There is no such session. It may have been deleted. ' : `This cannot be loaded: ${err.message}. `;
  if (player?.scene) note(text);
  else message(text, el('a', { href: '/', textContent: 'All sessions' }));
}

const WORDS = {
  loading: 'Loading…',
  waiting: 'Waiting for the page’s next snapshot: until it comes there is nothing to draw on.',
  empty: 'Nothing was recorded that can be shown: the session has no full snapshot.',
};

// About.

function describe() {
  const { info } = recording;
  const meta = info.metadata ?? {};
  $.title.textContent = document.title = place(meta.url);
  $.title.title = words(meta.url);
  const size = meta.viewport ? `${words(meta.viewport.width)} × ${words(meta.viewport.height)}` : undefined;
  const known = {
    User: info.userId, Page: meta.url, 'First page': meta.entryUrl, 'Came from': meta.referrer, Started: when(recording.start ?? info.createdAt),
    Duration: clock(length()), Events: count(recording.total), Window: size, 'Time zone': meta.timeZone,
    Browser: meta.userAgent, Session: id,
  };
  const told = ['sessionId', 'userId', 'url', 'entryUrl', 'referrer', 'startTime', 'viewport', 'timeZone', 'userAgent'];
  const others = Object.entries(meta).filter(([name]) => !told.includes(name)).slice(0, 50);
  const rows = [...Object.entries(known), ...others].filter(([, v]) => v !== undefined && v !== null && v !== '');
  for (const [name, value] of rows) fact(name, words(value));
}

const facts = new Map();

function fact(name, text) {
  if (text === '{}' || facts.get(name)?.textContent === text) return;
  if (!facts.has(name)) {
    facts.set(name, el('dd'));
    $.about.append(el('dt', { textContent: name }), facts.get(name));
  }
  facts.get(name).textContent = text;
}

const length = () => Math.max(0, recording.end - recording.start) || 0;

// Errors and marks.

function addError({ data, createdAt }) {
  const sent = Number.isFinite(data?.timestamp) ? data.timestamp : Date.parse(data?.timestamp ?? createdAt);
  const latest = recording.isActive ? Infinity : recording.end; // live, an error comes before its events
  const time = Math.min(Math.max(Number.isFinite(sent) ? sent : recording.end, recording.start), latest);
  const text = words(data?.message ?? data?.reason ?? data?.error) || 'Error without a message';
  const button = el('button', { title: words(data?.stack), onclick: () => jump(time - 1000) },
    el('time', { textContent: clock(time - recording.start) }), ' ', text.slice(0, 500));
  $.errors.append(el('li', {}, button));
  $['no-errors'].hidden = true;
  addMark({ time, kind: 'error', text });
}

function addMark(mark) {
  const key = `${mark.kind} ${mark.time}`;
  if (marks.has(key) || marks.size >= MARKS) return;
  marks.set(key, { ...mark, node: $.marks.appendChild(el('span', { className: mark.kind, title: mark.text })) });
  placeMark(marks.get(key));
}

function placeMark({ time, node }) {
  const share = (time - recording.start) / (length() || 1);
  node.style.left = `${100 * Math.min(Math.max(share, 0), 1)}%`;
}

// Marks come with the events that are loaded. A small session is read once
// through in advance (its chunks stay in the browser's cache), so that its time
// line is complete from the start.
async function scan() {
  if (recording.chunks.length > SCAN_CHUNKS || recording.chunks.reduce((sum, c) => sum + c.bytes, 0) > SCAN_BYTES) return;
  const cleaner = new Cleaner();
  for (const chunk of recording.chunks) {
    cleaner.take((await recording.readChunk(chunk, 0)).events).marks.forEach(addMark);
  }
}

// The player's face.

function change() {
  const { state, time } = player;
  const shown = Math.min(Math.max(time - recording.start, 0), length()) || 0;
  message(player.scene && state === 'loading' ? '' : WORDS[state] ?? '');
  $.stage.classList.toggle('busy', state === 'loading');
  $.play.textContent = player.wantsPlay && state !== 'ended' ? 'Pause' : state === 'ended' ? 'Play again' : 'Play';
  $.play.disabled = $.seek.disabled = !player.scene;
  $.now.textContent = clock(shown);
  if ($.length.textContent !== clock(length())) {
    $.length.textContent = clock(length());
    marks.forEach(placeMark); // the line of a live session grows
    describe();
  }
  if (!dragging) $.seek.value = Math.min(shown, $.seek.max = length());
  $.seek.setAttribute('aria-valuetext', `${clock(shown)} of ${clock(length())}`);
  $.live.hidden = !recording.isActive;
  $.live.setAttribute('aria-pressed', player.following);
  badge(recording.isActive ? 'Live' : 'Recorded');
  sayGaps(time);
}

function badge(text) {
  if ($.badge.textContent === text) return;
  Object.assign($.badge, { hidden: false, textContent: text, className: `badge ${text.toLowerCase()}` });
}

function sayGaps(time) {
  for (const m of marks.values()) {
    if (m.kind !== 'gap' || m.time <= shownTime || m.time > time || time - shownTime > 60000) continue;
    note(`The recording has a gap here${m.ms > 0 ? ` of ${clock(m.ms)}` : ''}: what happened in it was not kept.`);
  }
  shownTime = time;
}

function jump(time) {
  note('');
  const sought = player.seek(time);
  remember();
  return sought;
}

function toggle() {
  if (player.wantsPlay && player.state !== 'ended') player.pause();
  else player.play();
  remember();
}

// remember keeps the place in the address, to be sent on or reloaded.
function remember() {
  const seconds = Math.max(0, Math.round((player.time - recording.start) / 1000));
  history.replaceState(null, '', player.following ? location.pathname : `${location.pathname}?t=${seconds || 0}`);
}

function goLive() {
  note('');
  player.follow();
  remember();
}

let dragging = false;

function controls() {
  $.play.onclick = toggle;
  $.live.onclick = goLive;
  $.seek.oninput = () => {
    dragging = true;
    $.now.textContent = clock(Number($.seek.value));
  };
  $.seek.onchange = () => {
    dragging = false;
    jump(recording.start + Number($.seek.value));
  };
  $.speed.onchange = () => player.setSpeed(Number($.speed.value));
  $.skip.onchange = () => { player.skip = $.skip.checked; };
  $.full.onclick = fullScreen;
  $.delete.onclick = remove;
  document.addEventListener('keydown', key);
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $.player.requestFullscreen().catch(() => note('This browser does not allow full screen here.'));
}

function key(e) {
  if (e.altKey || e.ctrlKey || e.metaKey || !player.scene) return;
  const { tagName } = e.target;
  if (tagName === 'SELECT' || (e.key === ' ' && (tagName === 'BUTTON' || e.target === $.skip))) return;
  const action = {
    ' ': toggle, f: fullScreen,
    ArrowLeft: () => jump(player.time - STEP), ArrowRight: () => jump(player.time + STEP),
  }[e.key];
  if (!action) return;
  e.preventDefault();
  action();
}

async function remove() {
  if (!confirm('Delete this session? It cannot be brought back.')) return;
  try {
    await request(recording.path, { method: 'DELETE' });
    location.assign('/');
  } catch (err) {
    note(`It was not deleted: ${err.message}`);
  }
}

// Live.

function watch() {
  feed = connect({ onOpen: (send) => send('viewer_join_session', { sessionId: id }), onMessage: receive, onWait: waiting });
}

function receive(type, data, bytes) {
  if (data.sessionId !== id) return;
  if (type === 'session_joined') joined(data);
  else if (type === 'events_batch') player.batch(data.fromIndex, data.events, bytes);
  else if (type === 'javascript_error' || type === 'promise_rejection') addError({ data, createdAt: Date.now() });
  else if (type === 'session_lagged') player.missed(data.nextIndex);
  else if (type === 'session_ended') ended();
  else if (type === 'session_started') feed.send('viewer_join_session', { sessionId: id });
}

let first = true;

// joined answers the first join and those after a lost connection or the
// session's return: what was missed meanwhile is read as history.
async function joined({ totalEvents, snapshotIndex, isActive }) {
  player.missed(totalEvents);
  recording.newestSnapshot = snapshotIndex ?? recording.newestSnapshot;
  recording.isActive = isActive;
  if (!isActive) return ended();
  if (player.returns || player.state === 'waiting' || (first && !new URLSearchParams(location.search).has('t'))) {
    note('');
    player.follow();
  }
  first = false;
}

async function ended() {
  note('The session has ended; this is its recording.');
  await player.ended().catch(failed);
  describe();
}

async function open() {
  const info = await recording.load();
  player = new Player(recording, $.stage, { change, mark: addMark, note, failed });
  window.player = player; // for the console, and for tests
  describe();
  controls();
  $.delete.disabled = false;
  const t = new URLSearchParams(location.search).get('t');
  if (info.isActive) watch();
  if (!info.isActive || t !== null) player.seek(recording.start + 1000 * (Number(t) || 0));
  const { errors } = await patiently(() => getJSON(`${recording.path}/errors`));
  errors.forEach(addError); // as they came in
  await scan().catch(() => {}); // the marks come as the events do
}

offerSignOut($.signout);
if (window.rrwebReplay) open().catch(failed);
else message('This server was built without its player. Run “make web”, build it again, and reload this page.');
