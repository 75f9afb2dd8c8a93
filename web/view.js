// The page of one session: its player, what happened in it, what it is.

import {
  browser, clock, connect, copied, count, el, getJSON, HttpError, inWaiting, offerSignOut, patiently, person, place, request, when, words,
} from './api.js';
import { Cleaner } from './events.js';
import { Panel } from './panel.js';
import { Player } from './player.js';
import { Recording } from './recording.js';

const $ = Object.fromEntries([...document.querySelectorAll('[id]')].map((node) => [node.id, node]));
const id = decodeURIComponent(location.pathname.split('/').at(-1));
const recording = new Recording(id, waiting);
const SCAN_BYTES = 4 << 20, SCAN_CHUNKS = 300;
const STEP = 5000, LONG_STEP = 30000;
const LEAD = 1000; // while it plays, a line is shown and gone to this much early: one sees it happen
const panel = new Panel({
  lines: $.lines, filters: $.filters, nothing: $.nothing, marks: $.marks, timeline: $.timeline, seek: $.seek, tip: $.tip,
}, (time) => jump(time - lead()));
let player, feed, shownTime = 0;

// Words: the message stands in the stage instead of a picture, the note below it.

function message(text, ...more) {
  if ($.message.firstChild?.textContent === text) return;
  $.message.replaceChildren(text, ...more);
  $.message.hidden = !text;
}

const write = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function note(text) { write($.note, text); }

function waiting(ms) { note(ms ? inWaiting(ms) : 'Connected again.'); }

function failed(err) {
  const gone = err instanceof HttpError && err.status === 404;
  const text = gone ? 'There is no such session. It may have been deleted. ' : `This cannot be loaded: ${err.message}. `;
  if (player?.scene) return note(text);
  for (const part of [$.panel, document.querySelector('aside')]) part.hidden = !recording.info;
  return message(text, el('a', { href: '/', textContent: 'All sessions' }));
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
  write($.who, person(info.userId));
  $.who.title = `All sessions of ${words(info.userId)}`;
  document.title = `${person(info.userId)} · ${place(meta.url)}`;
  const size = meta.viewport ? `${words(meta.viewport.width)} × ${words(meta.viewport.height)}` : undefined;
  $.who.href = `/?userId=${encodeURIComponent(info.userId)}`;
  facts($.about, {
    Browser: browser(meta.userAgent), Window: size, Started: when(recording.start ?? info.createdAt), Duration: clock(length()),
  });
  facts($.more, { ...traits(meta), 'First page': meta.url, 'Last page': meta.lastUrl, 'Came from': meta.referrer, 'Time zone': meta.timeZone,
    'User id': info.userId, Events: count(recording.total), 'User agent': meta.userAgent, Session: id });
}

// traits are what the page says of its user, and whatever else it sent.
function traits({ traits: given, ...meta }) {
  const told = ['sessionId', 'userId', 'url', 'entryUrl', 'lastUrl', 'referrer', 'startTime', 'viewport', 'timeZone', 'userAgent', 'pages', 'clicks'];
  const others = Object.entries(meta).filter(([name]) => !told.includes(name));
  const own = given !== null && typeof given === 'object' ? Object.entries(given) : [];
  return Object.fromEntries([...own, ...others].slice(0, 50));
}

// facts keeps the nodes that there are: somebody may be reading them.
const known = new Map();

function facts(list, all) {
  for (const [name, value] of Object.entries(all)) {
    const key = `${list.id} ${name}`, text = words(value);
    if (!text || text === '{}') continue;
    if (!known.has(key)) {
      known.set(key, el('dd'));
      list.append(el('dt', { textContent: name }), known.get(key));
    }
    write(known.get(key), text);
  }
}

const length = () => Math.max(0, recording.end - recording.start) || 0;

// What happened.

// addError groups errors that say the same: the first has the line.
function addError({ id: number, data, createdAt }) {
  const sent = Number.isFinite(data?.timestamp) ? data.timestamp : Date.parse(data?.timestamp ?? createdAt);
  const latest = recording.isActive ? Infinity : recording.end; // live, an error comes before its events
  const time = Math.min(Math.max(Number.isFinite(sent) ? sent : recording.end, recording.start), latest);
  const text = (words(data?.message ?? data?.reason ?? data?.error) || 'Error without a message').slice(0, 500);
  const detail = words(data?.stack).slice(0, 5000);
  const group = `error ${text} ${detail}`, key = panel.moments.has(group) ? `${group} ${number ?? time}` : group;
  if (key !== group && panel.moments.has(key)) return;
  const first = panel.moments.get(group);
  panel.add({ key, kind: 'error', time, text, detail, n: 1, again: first && group });
  if (first) panel.add({ key: group, n: first.n + 1 });
}

// read counts the chunks that the list is filled from. Those of a small session
// are all read in advance (they stay in the browser's cache); those of a long
// one as they are played, or on demand.
const read = new Set();

function took({ from, next }) {
  const size = read.size;
  for (const c of recording.chunks) if (from <= c.fromIndex && c.fromIndex + c.count <= next) read.add(c.fromIndex);
  if (size !== read.size) sayPart();
}

function sayPart() {
  const all = recording.chunks.length;
  $.part.hidden = read.size >= all;
  write($['part-text'], `A long session: this list is filled as it is played, ${count(read.size)} of ${count(all)} parts so far.`);
}

const isLong = () => recording.chunks.length > SCAN_CHUNKS || recording.chunks.reduce((sum, c) => sum + c.bytes, 0) > SCAN_BYTES;

async function scan() {
  const cleaner = new Cleaner();
  for (const chunk of recording.chunks) {
    const piece = await recording.readChunk(chunk, 0);
    for (const moment of cleaner.take(piece.events).marks) panel.add(moment);
    took(piece);
  }
}

// The player's face.

const lead = () => (player.state === 'playing' && !player.following ? LEAD : 0);

function change() {
  const { state, time } = player;
  const shown = Math.min(Math.max(time - recording.start, 0), length()) || 0;
  message(player.scene && state === 'loading' ? '' : WORDS[state] ?? '');
  $.stage.classList.toggle('busy', state === 'loading');
  write($.play, player.wantsPlay && state !== 'ended' ? 'Pause' : state === 'ended' ? 'Play again' : 'Play');
  $.play.disabled = $.seek.disabled = $.copy.disabled = !player.scene;
  if ($.length.textContent !== clock(length())) {
    write($.length, clock(length()));
    describe();
  }
  panel.measure(recording.start, length()); // the line of a live session grows
  panel.head(time + lead());
  if (!dragging) {
    write($.now, clock(shown));
    $.seek.value = Math.min(shown, $.seek.max = length());
    $.timeline.style.setProperty('--played-share', shown / (length() || 1));
  }
  if (state !== 'playing' || document.activeElement !== $.seek) $.seek.setAttribute('aria-valuetext', `${clock(shown)} of ${clock(length())}`);
  $.live.hidden = !recording.isActive;
  $.live.setAttribute('aria-pressed', player.following);
  sayWhere(time);
  sayGap(time);
}

function sayWhere(time) {
  const page = panel.pageAt(time);
  const url = page?.href || words(recording.info.metadata?.url);
  write($.address, url);
  $.address.title = url;
  write($['page-title'], page?.title ?? '');
}

// state: live, hidden (its tab is), left (nobody is there, it may come back).
let state = 'live';
const STATES = { live: 'Live', hidden: 'Live, in the background', left: 'Live, nobody there now', recorded: '' };

function badge() {
  const now = recording.isActive ? state : 'recorded';
  $.badge.hidden = !STATES[now];
  write($.badge, STATES[now]);
  $.badge.className = `badge ${now}`;
}

function sayGap(time) {
  const gap = [...panel.moments.values()].find((m) => m.kind === 'gap' && m.time > shownTime && m.time <= time);
  if (gap && time - shownTime < 60000) gapNote(gap);
  shownTime = time;
}

function gapNote(gap) {
  const ms = gap.to - gap.time;
  note(`The recording has a gap here${ms > 0 ? ` of ${clock(ms)}` : ''}: what happened in it was not kept.`);
}

function gapAt(time) {
  const gap = panel.spanAt('gap', time);
  if (gap) gapNote(gap);
  return gap;
}

// What people do.

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

function here() {
  const seconds = Math.max(0, Math.round((player.time - recording.start) / 1000)) || 0;
  return player.following ? location.pathname : `${location.pathname}?t=${seconds}`;
}

// remember keeps the place in the address, to be sent on or reloaded.
function remember() { history.replaceState(null, '', here()); }

async function copy() {
  remember();
  if (await copied(location.href)) note(`The link to ${player.following ? 'this live session' : clock(player.time - recording.start)} is copied.`);
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
    write($.now, clock(Number($.seek.value)));
    $.timeline.style.setProperty('--played-share', $.seek.value / (length() || 1));
  };
  $.seek.onchange = () => {
    dragging = false;
    jump(recording.start + Number($.seek.value));
  };
  $.speed.onchange = () => player.setSpeed(Number($.speed.value));
  $.skip.checked = player.skip = localStorage.getItem('skip') !== 'false';
  $.skip.onchange = () => localStorage.setItem('skip', player.skip = $.skip.checked);
  $.full.onclick = fullScreen;
  $.copy.onclick = copy;
  $.delete.onclick = remove;
  $['read-all'].onclick = () => {
    $['read-all'].disabled = true;
    scan().catch(failed);
  };
  document.addEventListener('keydown', key);
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $.player.requestFullscreen().catch(() => note('This browser does not allow full screen here.'));
}

function faster(by) {
  $.speed.selectedIndex = Math.min(Math.max($.speed.selectedIndex + by, 0), $.speed.options.length - 1);
  $.speed.onchange();
}

const KEYS = {
  ' ': toggle, f: fullScreen, c: copy, n: () => panel.step(1), p: () => panel.step(-1),
  '<': () => faster(-1), '>': () => faster(1), '?': () => $.keys.showModal(),
  ArrowLeft: (e) => jump(player.time - (e.shiftKey ? LONG_STEP : STEP)),
  ArrowRight: (e) => jump(player.time + (e.shiftKey ? LONG_STEP : STEP)),
  Home: () => jump(recording.start), End: () => jump(recording.end),
};

function key(e) {
  if (e.altKey || e.ctrlKey || e.metaKey || !player.scene || $.keys.open) return;
  const { tagName } = e.target;
  if (tagName === 'SELECT' || (e.key === ' ' && (['BUTTON', 'SUMMARY', 'A'].includes(tagName) || e.target === $.skip))) return;
  const tenth = /^\d$/.test(e.key) ? () => jump(recording.start + (length() * e.key) / 10) : undefined;
  const action = KEYS[e.key] ?? tenth;
  if (!action) return;
  e.preventDefault();
  action(e);
}

async function remove() {
  if (!confirm(`Delete this session of ${person(recording.info.userId)}? It cannot be brought back.`)) return;
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
  else if (type === 'session_state') setState(data.state);
  else if (type === 'session_lagged') player.missed(data.nextIndex);
  else if (type === 'session_ended') ended();
  else if (type === 'session_started') feed.send('viewer_join_session', { sessionId: id });
}

function setState(now) {
  state = now;
  badge();
}

let first = true;

// joined answers the first join and those after a lost connection or the
// session's return: what was missed meanwhile is read as history.
async function joined({ totalEvents, snapshotIndex, isActive, state: now = 'live' }) {
  player.missed(totalEvents);
  recording.newestSnapshot = snapshotIndex ?? recording.newestSnapshot;
  recording.isActive = isActive;
  setState(now);
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
  badge();
}

async function open() {
  const info = await recording.load();
  player = new Player(recording, $.stage, { change, mark: (moment) => panel.add(moment), piece: took, gapAt, note, failed });
  window.player = player; // for the console, and for tests
  describe();
  setState(info.state ?? 'live');
  controls();
  $.delete.disabled = false;
  $.export.href = `${recording.path}/export`;
  const t = new URLSearchParams(location.search).get('t');
  if (info.isActive) watch();
  if (!info.isActive || t !== null) player.seek(recording.start + 1000 * (Number(t) || 0));
  const { errors } = await patiently(() => getJSON(`${recording.path}/errors`));
  panel.measure(recording.start, length());
  errors.forEach(addError); // as they came in
  if (isLong()) sayPart();
  else await scan().catch(() => {}); // what happened comes as the events do
  change();
}

$.help.onclick = () => $.keys.showModal();
offerSignOut($.signout);
if (window.rrwebReplay) open().catch(failed);
else message('This server was built without its player. Run “make web”, build it again, and reload this page.');
