// The page of one session: its player, what happened in it, what it is.

import {
  $, browser, clock, connect, copied, count, el, getJSON, inWaiting, offerSignOut, patiently, person, place, remove,
  when, words, write,
} from './api.js';
import { Cleaner } from './events.js';
import { Panel } from './panel.js';
import { Player } from './player.js';
import { Recording } from './recording.js';

const id = decodeURIComponent(location.pathname.split('/').at(-1));
const asked = new URLSearchParams(location.search).get('t');
const recording = new Recording(id, waiting);
const SCAN_BYTES = 4 << 20, SCAN_CHUNKS = 300;
const STEP = 5000, LONG_STEP = 30000;
const LEAD = 1000; // while it plays, a line is shown and gone to this much early: one sees it happen
const PASSED = 2000; // so soon after a gap it is told
const panel = new Panel($, (time) => jump(time - lead()));
const tell = (moment) => panel.add(moment);
let player, feed, gap;

// Words: the message stands in the stage instead of a picture, the note below it.

function message(text) { write($.message, text); }
function note(text) { write($.note, text || player?.scene?.lack || ''); }
function waiting(ms) { note(ms ? inWaiting(ms) : 'Connected again.'); }

function failed(err) {
  const gone = 'There is no such session. It may have been deleted.';
  const text = err.status === 404 ? gone : `This cannot be loaded: ${err.message}.`;
  if (player?.scene) return note(text);
  $.panel.hidden = $.aside.hidden = !recording.info;
  return message(text);
}

const WORDS = {
  loading: 'Loading…',
  waiting: 'Waiting for the page’s next snapshot: until it comes there is nothing to draw on.',
  empty: 'Nothing was recorded that can be shown: the session has no full snapshot.',
};
const LARGE = 'This page was too large to be recorded: its snapshot does not fit into one message.';

function sayState({ state, scene }) {
  const large = !scene && state !== 'loading' && panel.at('gap', Infinity)?.lost;
  message(large ? LARGE : scene && state === 'loading' ? '' : WORDS[state] ?? '');
  $.stage.classList.toggle('busy', state === 'loading');
}

// About.

const TOLD = ('sessionId userId url entryUrl title lastUrl lastTitle referrer startTime viewport timeZone userAgent'
  + ' create page firstSeq pages clicks traits').split(' ');

function describe() {
  const { info } = recording, meta = info.metadata ?? {}, name = person(info.userId);
  const { width, height } = meta.viewport ?? {};
  write($.who, name);
  $.who.title = `All sessions of ${words(info.userId)}`;
  $.who.href = `/?userId=${encodeURIComponent(info.userId)}`;
  document.title = `${name} · ${place(meta.url)}`;
  const facts = {
    browser: browser(meta.userAgent), size: width && `${words(width)} × ${words(height)}`,
    started: when(recording.start ?? info.createdAt), 'first-page': meta.url, 'last-page': meta.lastUrl,
    'came-from': meta.referrer, 'time-zone': meta.timeZone, 'user-id': info.userId, 'user-agent': meta.userAgent,
    'session-id': id,
  };
  for (const [name, value] of Object.entries(facts)) write($[name], words(value));
  // What the page says of its user, and whatever else it sent.
  const others = Object.entries(meta).filter(([name]) => !TOLD.includes(name));
  const traits = [...Object.entries(meta.traits ?? {}), ...others].slice(0, 50);
  $.traits.replaceChildren(...traits.flatMap(([name, value]) =>
    [el('dt', { textContent: name }), el('dd', { textContent: words(value) })]));
}

const length = () => Math.max(0, recording.end - recording.start) || 0;

// What happened.

// addError groups errors that say the same: the first has the line.
function addError({ data, createdAt }) {
  const sent = Number.isFinite(data?.timestamp) ? data.timestamp : Date.parse(data?.timestamp ?? createdAt);
  const latest = recording.isActive ? Infinity : recording.end; // live, an error comes before its events
  const time = Math.min(Math.max(Number.isFinite(sent) ? sent : recording.end, recording.start), latest);
  const text = (words(data?.message ?? data?.reason ?? data?.error) || 'Error without a message').slice(0, 500);
  const detail = words(data?.stack).slice(0, 5000), key = `error ${text} ${detail}`;
  const { times } = panel.moments.get(key) ?? { times: [] };
  if (times.includes(time)) return; // it came live, and is stored
  times.push(time);
  tell({ key, kind: 'error', time: times[0], text, detail, times, n: times.length });
  if (times.length > 1) tell({ key: `${key} ${time}`, kind: 'error', time, text, again: true });
}

// read has the chunks that the list is filled from. Those of a small session are
// all read in advance (they stay in the browser's cache); those of a long one as
// they are played, or on demand.
const read = new Set();

function took({ from }) {
  read.add(from);
  if (!$.part.hidden) sayPart();
}

function sayPart() {
  const { chunks } = recording, known = chunks.filter((c) => read.has(c.fromIndex)).length;
  $.part.hidden = known === chunks.length;
  const far = `${count(known)} of ${count(chunks.length)} parts so far`;
  write($['part-text'], `A long session: this list is filled as it is played, ${far}.`);
}

const isLong = ({ chunks }) => chunks.length > SCAN_CHUNKS || chunks.reduce((sum, c) => sum + c.bytes, 0) > SCAN_BYTES;

async function scan() {
  const cleaner = new Cleaner(null, tell);
  for (const chunk of recording.chunks) {
    const piece = await recording.readChunk(chunk, 0);
    cleaner.take(piece.events);
    took(piece);
  }
}

// The player's face.

const lead = () => (player.state === 'playing' && !player.following ? LEAD : 0);

function change() {
  const { state, time } = player;
  sayState(player);
  write($.play, state === 'ended' ? 'Play again' : player.wantsPlay ? 'Pause' : 'Play');
  $.play.disabled = $.seek.disabled = $.copy.disabled = !player.scene;
  panel.measure(recording.start, length()); // the line of a live session grows
  panel.head(time + lead());
  for (const part of [$.length, $.duration]) write(part, clock(length()));
  write($.events, count(recording.total));
  if (!dragging) sayTime(Math.min(Math.max(time - recording.start, 0), length()) || 0);
  $.live.hidden = !recording.isActive;
  $.live.ariaPressed = player.following;
  sayWhere(panel.at('navigation', time));
  sayGap(panel.at('gap', time), time);
}

function sayTime(shown) {
  $.seek.value = Math.min(shown, $.seek.max = length());
  write($.now, clock(shown));
  $.timeline.style.setProperty('--played-share', shown / (length() || 1));
  const isRead = document.activeElement === $.seek && player.state === 'playing'; // aloud, all the time
  if (dragging || !isRead) $.seek.ariaValueText = `${clock(shown)} of ${clock(length())}`;
}

function sayWhere(page) {
  const url = page?.href || words(recording.info.metadata?.url);
  write($.address, url);
  $.address.title = url;
  write($['page-title'], page?.title ?? '');
}

function sayGap(now, time) {
  if (now && now !== gap && time - (now.to ?? now.time) < PASSED) {
    const long = now.to > now.time ? ` of ${clock(now.to - now.time)}` : '';
    note(now.lost || `The recording has a gap here${long}: what happened in it was not kept.`);
  }
  gap = now;
}

// state: live, hidden (its tab is), left (nobody is there, it may come back).
const STATES = { live: 'Live', hidden: 'Live, in the background', left: 'Live, nobody there now' };

function badge(state) {
  $.badge.hidden = !recording.isActive;
  if (state) Object.assign($.badge, { textContent: STATES[state], className: `badge ${state}` });
}

// What people do.

function jump(time) {
  note('');
  player.seek(time);
  remember();
}

function toggle() {
  if (player.wantsPlay && player.state !== 'ended') player.pause();
  else player.play();
  remember();
}

// remember keeps the place in the address, to be sent on or reloaded.
function remember() {
  const seconds = Math.max(0, Math.round((player.time - recording.start) / 1000)) || 0;
  history.replaceState(null, '', player.following ? location.pathname : `${location.pathname}?t=${seconds}`);
}

async function copy() {
  remember();
  const what = player.following ? 'this live session' : clock(player.time - recording.start);
  if (await copied(location.href)) note(`The link to ${what} is copied.`);
}

function goLive() {
  note('');
  player.follow();
  remember();
}

let dragging = false;

function controls() {
  const buttons = { play: toggle, live: goLive, full: fullScreen, copy, delete: removeSession, 'read-all': readAll };
  for (const [name, does] of Object.entries(buttons)) $[name].onclick = does;
  $.seek.oninput = () => {
    dragging = true;
    sayTime(Number($.seek.value));
  };
  $.seek.onchange = () => {
    dragging = false;
    jump(recording.start + Number($.seek.value));
  };
  $.speed.onchange = () => player.setSpeed(Number($.speed.value));
  $.skip.checked = player.skip = kept('skip') !== 'false';
  $.skip.onchange = () => kept('skip', player.skip = $.skip.checked);
  document.addEventListener('keydown', key);
}

// kept gives what this browser keeps under a name, or keeps a value: where it may.
function kept(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function readAll() {
  $['read-all'].disabled = true;
  scan().catch(failed);
}

async function fullScreen() {
  if (document.fullscreenElement) return document.exitFullscreen();
  try {
    await $.player.requestFullscreen(); // which iPhones do not have
  } catch {
    note('This browser does not allow full screen here.');
  }
}

function faster(by) {
  const { options, selectedIndex } = $.speed;
  $.speed.value = (options[selectedIndex + by] ?? options[selectedIndex]).value;
  $.speed.onchange();
}

const KEYS = {
  ' ': toggle, f: fullScreen, c: copy, n: () => panel.step(1), p: () => panel.step(-1),
  '<': () => faster(-1), '>': () => faster(1), '?': () => $.keys.showModal(),
  ArrowLeft: (e) => jump(player.time - (e.shiftKey ? LONG_STEP : STEP)),
  ArrowRight: (e) => jump(player.time + (e.shiftKey ? LONG_STEP : STEP)),
  Home: () => jump(recording.start), End: () => jump(recording.end),
};
for (let n = 0; n < 10; n++) KEYS[n] = () => jump(recording.start + (length() * n) / 10);

function key(e) {
  if (e.altKey || e.ctrlKey || e.metaKey || !player.scene || $.keys.open || e.target.tagName === 'SELECT') return;
  if (e.key === ' ' && e.target.matches('button, summary, a, input[type=checkbox]')) return;
  if (!Object.hasOwn(KEYS, e.key)) return;
  e.preventDefault();
  KEYS[e.key](e);
}

async function removeSession() {
  const asks = `Delete this session of ${person(recording.info.userId)}?`;
  if (await remove(recording.path, asks, note)) location.assign('/');
}

// Live.

const join = () => feed.send('viewer_join_session', { sessionId: id });

function receive(type, data, bytes) {
  if (data.sessionId !== id) return;
  if (type === 'session_joined') joined(data);
  else if (type === 'events_batch') player.batch(data.fromIndex, data.events, bytes);
  else if (type === 'javascript_error' || type === 'promise_rejection') addError({ data, createdAt: Date.now() });
  else if (type === 'session_state') badge(data.state);
  else if (type === 'session_lagged') player.missed(data.nextIndex);
  else if (type === 'session_ended') ended();
  else if (type === 'session_started') join();
}

// joined answers the first join and those after a lost connection or the
// session's return: what was missed meanwhile is read as history.
function joined({ totalEvents, snapshotIndex, isActive, state }) {
  player.missed(totalEvents);
  recording.newestSnapshot = snapshotIndex ?? recording.newestSnapshot;
  recording.isActive = isActive;
  badge(state ?? 'live');
  if (!isActive) return ended();
  if (player.wantsLive || player.state === 'waiting') {
    note('');
    player.follow();
  }
}

async function ended() {
  note('The session has ended; this is its recording.');
  await player.ended().catch(failed);
  describe();
  badge();
}

async function open() {
  const info = await recording.load();
  player = new Player(recording, $.stage, {
    change, note, failed, piece: took, mark: tell, gapEnd: (time) => panel.at('gap', time)?.to ?? 0,
  });
  window.player = player; // for the console, and for tests
  describe();
  badge(info.state ?? 'live');
  controls();
  $.delete.disabled = false;
  $.export.href = `${recording.path}/export`;
  if (info.isActive) feed = connect({ onOpen: join, onMessage: receive, onWait: waiting });
  if (!info.isActive || asked !== null) player.seek(recording.start + 1000 * (Number(asked) || 0));
  const { errors } = await patiently(() => getJSON(`${recording.path}/errors`));
  panel.measure(recording.start, length());
  errors.forEach(addError); // as they came in
  if (isLong(recording)) sayPart();
  else await scan().catch(() => {}); // what happened comes as the events do
  change();
}

$.help.onclick = () => $.keys.showModal();
offerSignOut();
if (window.rrwebReplay) open().catch(failed);
else message('This server was built without its player. Run “make web”, build it again, and reload this page.');
