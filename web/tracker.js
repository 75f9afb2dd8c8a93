// tracker.js records the page that embeds it. The server serves it behind rrweb's
// recorder and the other tracker-*.js, all in one function: rrwebRecord is a
// local name here, no global.
//
//   <script src="https://replay.example.com/tracker.js" async data-user="ann"></script>
//
// Options, as data- attributes or, like maskText, in sessionReplay.start({…}):
//   user, visitor    who this is; else a random id, unless visitor is "off"
//   endpoint, key    the server, if not the script's; its INGEST_KEY
//   sample-rate      0 to 1: the share of tabs that are recorded
//   autostart        "false": nothing happens before sessionReplay.start() (consent)
//   gpc              "ignore": record in spite of Global Privacy Control
//   mask-text        selector of what is masked as by data-replay-mask
//   block-selector   selector of what is left out as by data-replay-block
//   allow-query      keep the query strings of URLs
//   inline-images    "true": copies of the pictures go into the recording
//   record-canvas    frames a second: canvases are recorded
//
// window.sessionReplay: start(options), stop(), identify(user, traits),
// event(name, payload), sessionId.
//
// What somebody typed never leaves the page; what goes wrong here never reaches
// it: every way in goes through safe().
if (window.sessionReplay && typeof window.sessionReplay.start === "function") return; // embedded twice

const script = document.currentScript || document.querySelector('script[src*="/tracker.js"]');
const { record } = rrwebRecord;
const { stringify } = JSON; // pages replace such things; these are from before
const Socket = window.WebSocket;

const FLUSH_MS = 500, FLUSH_EVENTS = 50;
const BUFFER = 8 << 20; // UTF-16 units of JSON that may wait for an ack, the newest full snapshot apart
const QUOTA = 2 << 20; // UTF-16 units of them in sessionStorage
const IDLE_MS = 30 * 60_000; // a page that loads after this begins a new session
const CHECKOUT_MS = 5 * 60_000;
const SILENCE_MS = 30_000; // without a session_ready or an ack: the connection is dead
const RETRY_MS = 500, RETRY_MAX_MS = 30_000;
const MAX_ERRORS = 100; // a page, so that a loop of errors cannot flood
const STORE = "session-replay";

// rrweb's event types, and the sources of its incremental events, that matter here.
const FULL = 2, INCREMENTAL = 3, META = 4, CUSTOM = 5;
const MUTATION = 0, INPUT = 5, CANVAS = 9, ADOPTED = 15;

let options = {};
let wanted = false; // between start() and stop()
let stopRecorder = null;
let listeners = null; // an AbortController: ends every listener at once
let session = null; // {id, resume, next, acked, started, at, entry, referrer, user, traits}
let unlock = () => {};
let turn = 0; // raised when a begin() that waits is of no use any more
let held = []; // batches that are not acked: {seq (0: not sent yet), snap, text}
let heldSize = 0;
let notes = []; // errors that wait for a connection
let noted = 0;
let pending = [], pendingSize = 0, flushTimer = 0; // events of the next batch
let snapshotSize = 0; // of the newest full snapshot
let fullSince = 0; // when the buffer was full, and recording stopped
let socket = null, ready = false, readyAt = 0;
let stored = false; // sessionStorage has batches
let news = false; // identify() was called since the last session_start
let sent = 0; // how many of held went over this connection
let retries = 0, retryTimer = 0, silence = 0, refusals = 0;

const complain = (...what) => console.debug("session-replay:", ...what);

const safe = (f) => (...args) => {
  try {
    return f(...args);
  } catch (error) {
    return complain(error);
  }
};

// ── Recording ────────────────────────────────────────────────────────────────

// toText is JSON.stringify for pages whose libraries gave arrays and strings a
// toJSON of their own (Prototype.js did).
function toText(value) {
  const theirs = [Array.prototype, String.prototype].filter((p) => p.toJSON).map((p) => [p, p.toJSON]);
  for (const [p] of theirs) delete p.toJSON;
  try {
    return stringify(value);
  } finally {
    for (const [p, toJSON] of theirs) p.toJSON = toJSON;
  }
}

const emit = safe((event) => {
  if (!stopRecorder && event.type === INCREMENTAL) return; // after the recorder was stopped
  clean(event); // if it throws, the event is not recorded
  safe(picture.mend)(event);
  push(event);
  picture.took(event);
});

function startRecorder() {
  stopRecorder = () => {}; // rrweb emits before it returns
  const stop = record({
    emit,
    recordAfter: "DOMContentLoaded",
    checkoutEveryNms: CHECKOUT_MS, // looked at when there is an event: an idle page takes none
    maskInputOptions: { input: true, textarea: true, select: true }, // by element: every type of input
    maskInputFn: maskValue,
    blockSelector,
    ignoreSelector: IGNORED,
    slimDOMOptions: "all", // no scripts, comments, meta data
    sampling: { scroll: 150, media: 800, canvas: Number(options.recordCanvas) || undefined },
    recordCanvas: Number(options.recordCanvas) > 0,
    dataURLOptions: { type: "image/webp", quality: 0.7 },
    // Pages rely on the DOMExceptions of what rrweb wraps (insertRule and the
    // like); any other error in there is rrweb's own.
    errorHandler: (error) => !(error instanceof DOMException),
  });
  if (stop) stopRecorder = safe(stop);
}

function endRecorder() {
  if (stopRecorder) stopRecorder();
  stopRecorder = null;
}

const takeSnapshot = safe(() => { if (stopRecorder) record.takeFullSnapshot(true); });

const customEvent = (tag, payload) => ({ type: CUSTOM, data: { tag, payload }, timestamp: Date.now() });

function push(event) {
  if (fullSince) return;
  const text = cutQueries(toText(event));
  if (heldSize + pendingSize > BUFFER + snapshotSize) return bufferFull();
  if (event.type === META) flush(); // a snapshot's batch begins with its Meta
  pending.push(text);
  pendingSize += text.length;
  if (session) session.at = event.timestamp;
  const snap = event.type === FULL;
  if (snap) snapshotSize = pendingSize;
  if (snap || pending.length >= FLUSH_EVENTS) flush(snap);
  else if (!flushTimer) flushTimer = setTimeout(safe(() => flush()), FLUSH_MS);
}

function flush(snap = false) {
  clearTimeout(flushTimer);
  flushTimer = 0;
  if (!pending.length) return;
  held.push({ seq: 0, snap, text: pending.join(",") });
  heldSize += pendingSize;
  pending = [];
  pendingSize = 0;
  transmit();
}

// A full buffer stops the recorder: what is held stays playable. When half of it
// is acked recording goes on, with a word about the gap and a fresh snapshot.
function bufferFull() {
  fullSince = Date.now();
  flush();
  endRecorder();
}

function goOn() {
  if (!fullSince || !wanted || heldSize > BUFFER / 2) return;
  const gap = customEvent("gap", { from: fullSince, to: Date.now() });
  fullSince = 0;
  push(gap);
  startRecorder();
}

let lastHref, watching = false;
function noteNavigation() {
  const href = cutQuery(location.href);
  if (href === lastHref) return;
  lastHref = href;
  push(customEvent("navigation", { href }));
}

// watchHistory stays for good: other scripts may have wrapped what it wrapped.
function watchHistory() {
  lastHref = cutQuery(location.href);
  if (watching) return;
  watching = true;
  for (const name of ["pushState", "replaceState"]) {
    const original = history[name];
    history[name] = function (...args) {
      const result = original.apply(this, args);
      if (wanted) safe(noteNavigation)();
      return result;
    };
  }
}

function noteError(type, error, data) {
  if (++noted > MAX_ERRORS) return;
  Object.assign(data, { stack: error && error.stack, url: cutQuery(location.href), timestamp: Date.now() });
  for (const key of Object.keys(data)) if (typeof data[key] === "string") data[key] = cutQueries(data[key]).slice(0, 8192);
  notes.push(toText({ type, data }));
  transmit();
}

function listen() {
  listeners = new AbortController();
  // The prototype's own, because pages replace window.addEventListener too.
  const on = (target, type, f, capture = false) =>
    EventTarget.prototype.addEventListener.call(target, type, safe(f), { capture, signal: listeners.signal });
  on(window, "error", ({ message, filename, lineno, colno, error }) => {
    if (message) noteError("javascript_error", error, { message, filename, lineno, colno });
  });
  on(window, "unhandledrejection", ({ reason }) => {
    noteError("promise_rejection", reason, { reason: String(reason && reason.message || reason) });
  });
  on(window, "popstate", noteNavigation);
  on(window, "hashchange", noteNavigation);
  on(document, "visibilitychange", () => {
    if (ready) say("visibility_change", { hidden: document.hidden, timestamp: Date.now() });
    if (document.hidden) keep();
    else if (!socket) connect();
  }, true);
  on(window, "pagehide", leave, true);
  on(window, "pageshow", (e) => { if (e.persisted) comeBack(); }, true);
  on(document, "freeze", () => { keep(); disconnect(); }, true);
  on(document, "resume", connect, true);
  on(window, "online", () => { if (!ready) { disconnect(); connect(); } });
  on(window, "offline", () => { disconnect(); retry(); });
  watchHistory();
  picture.begin();
}

// ── The tab's session ────────────────────────────────────────────────────────
// sessionStorage carries it over reloads and navigations. A duplicated tab has a
// copy of that; a Web Lock tells which of the two goes on with the session.
// Without Web Locks (insecure origins) the duplicate takes it over: the server
// closes the other's connection, and that one stops.

const newId = () => (crypto.randomUUID ? crypto.randomUUID()
  : Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join(""));

const sizeOf = (batches) => batches.reduce((sum, batch) => sum + batch.text.length, 0);

function load() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORE));
    return stored && Date.now() - stored.at < IDLE_MS ? stored : null;
  } catch {
    return null;
  }
}

// keep stores what a next page needs. Every batch has its number by then, so
// that what does not fit is missed there, and said to be a gap. A page that is
// left before it has its session adds to what the page before it kept.
function keep(leaving = false) {
  flush();
  const tab = session || leaving && load();
  if (!tab) return;
  const all = session ? held : (tab.held || []).concat(held);
  if (session) for (const batch of all) batch.seq ||= session.next++;
  let room = QUOTA;
  const fitting = all.filter((batch) => (room -= batch.text.length) >= 0); // the oldest, without a hole
  for (const some of [fitting, []]) {
    try {
      sessionStorage.setItem(STORE, toText({ ...tab, held: some, notes: session ? notes : (tab.notes || []).concat(notes) }));
      stored = some.length > 0;
      return;
    } catch { /* the page has used the space, or there is none */ }
  }
}

const forget = safe(() => sessionStorage.removeItem(STORE));

function lock(id) {
  if (!navigator.locks) return Promise.resolve(true);
  const mine = turn;
  return new Promise((done) => {
    navigator.locks.request(`${STORE}:${id}`, { ifAvailable: true }, (got) => {
      const held = got !== null && mine === turn;
      done(held);
      return held && new Promise((release) => { unlock = release; });
    }).catch(() => done(true)); // no locks here: as if there were no API
  });
}

// claim gives the session that this tab had, if it is free. The page before
// this one may hold its lock for a moment still, and store something more.
async function claim() {
  for (let stored = load(), tries = 0; stored && tries < 6; tries++) {
    if (await lock(stored.id)) return load();
    await new Promise((done) => setTimeout(done, 150));
  }
  return null;
}

function newSession() {
  const id = newId();
  lock(id);
  return { id, resume: "", next: 1, acked: 0, started: Date.now(), at: Date.now(),
    entry: cutQuery(location.href), referrer: cutQuery(document.referrer) };
}

// begin finds the tab's session, while the recorder already fills held.
async function begin() {
  const mine = ++turn;
  const { held: before = [], notes: said = [], ...found } = await claim() || {};
  if (mine !== turn) return; // left or stopped meanwhile
  held = before.concat(held);
  stored = before.length > 0;
  notes = said.concat(notes);
  heldSize = sizeOf(held);
  session = found.id ? found : newSession();
  session.user = options.user || session.user || visitor();
  session.traits = { ...session.traits, ...options.traits };
  connect();
}

// leave leaves all that is held to the next page, which may be this one again,
// from the back/forward cache.
function leave() {
  keep(true);
  disconnect();
  letGo();
  session = null;
  held = [], notes = [];
  heldSize = 0;
}

function letGo() {
  turn++;
  unlock();
}

function comeBack() {
  begin().catch(complain);
  takeSnapshot();
}

// visitor is a random name for this browser on this site; nothing is measured.
function visitor() {
  if (options.visitor === "off") return undefined;
  try {
    const name = `${STORE}:visitor`;
    const id = localStorage.getItem(name) || `visitor_${newId()}`;
    localStorage.setItem(name, id);
    return id;
  } catch {
    return undefined;
  }
}

// ── Delivery ─────────────────────────────────────────────────────────────────
// A batch is held until the server has acked it, and sent again on each new
// connection; the server knows by its number what it has already.

const say = (type, data) => socket.send(toText({ type, data }));

function sayStart() {
  news = false;
  const { id, resume, started, entry, referrer, user, traits } = session;
  say("session_start", {
    sessionId: id, resume, userId: user, traits, startTime: started,
    url: cutQuery(location.href), entryUrl: entry, referrer, userAgent: navigator.userAgent,
    viewport: { width: innerWidth, height: innerHeight, devicePixelRatio },
    timeZone: Intl.DateTimeFormat().resolvedOptions().timeZone,
  });
}

function connect() {
  if (socket || !wanted || !session) return;
  clearTimeout(retryTimer);
  let opened;
  try {
    opened = socket = new Socket(options.url);
  } catch { // ws: from an https: page, for one
    return retry();
  }
  opened.onopen = safe(() => { if (opened === socket) sayStart(); });
  opened.onmessage = safe((e) => { if (opened === socket) receive(JSON.parse(e.data)); });
  opened.onclose = safe((e) => { if (opened === socket) closed(e.code); });
  watch();
}

// watch gives the connection up when the server owes an answer for too long.
function watch() {
  clearTimeout(silence);
  if (socket && (!ready || held.length)) silence = setTimeout(safe(() => { disconnect(); retry(); }), SILENCE_MS);
}

function disconnect() {
  clearTimeout(retryTimer);
  clearTimeout(silence);
  const closing = socket;
  socket = null;
  ready = false;
  if (closing) closing.close();
}

function retry() {
  if (!wanted) return;
  const pause = Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** retries++);
  clearTimeout(retryTimer);
  retryTimer = setTimeout(safe(connect), pause * (0.5 + Math.random() / 2));
}

function closed(code) {
  if (ready && Date.now() - readyAt > 10_000) retries = 0;
  disconnect();
  if (code === 4001) halt(); // another page has the session, and its storage
  else if (code === 4004 || code === 1009) halt(forget());
  else retry();
}

// halt ends recording, until the next page load unless start() is called.
function halt() {
  wanted = false;
  endRecorder();
  if (listeners) listeners.abort();
  disconnect();
  letGo();
  clearTimeout(flushTimer);
  session = null;
  held = [], pending = [], notes = [];
  heldSize = pendingSize = flushTimer = fullSince = 0;
}

function receive({ type, data = {} }) {
  if (type === "session_ready") started(data);
  else if (type === "events_ack" && data.sessionId === session.id) acked(data.seq);
  else if (type === "take_snapshot") takeSnapshot();
  else if (type === "error") refused(data);
}

function started({ sessionId, resume, lastSeq, accepted = lastSeq }) {
  session.resume = resume;
  if (ready && sessionId === session.id) return; // the answer to identify()
  if (sessionId !== session.id || lastSeq < session.acked) startOver(sessionId, lastSeq);
  else align(lastSeq, accepted);
  ready = true;
  readyAt = Date.now();
  if (news) sayStart();
  transmit();
  watch();
  goOn();
}

// startOver turns what is held into the beginning of another session: it can
// be played from the first full snapshot on.
function startOver(id, lastSeq) {
  flush();
  unlock();
  lock(id);
  const first = held.findIndex((batch) => batch.snap);
  held = first < 0 ? [] : held.slice(first);
  heldSize = sizeOf(held);
  for (const batch of held) batch.seq = 0;
  Object.assign(session, { id, next: lastSeq + 1, acked: lastSeq, started: Date.now() });
  sent = 0;
  if (first < 0) takeSnapshot();
}

// align makes what is held go on where the server stands. Numbers of batches
// that did not fit into storage are used up with a word about the gap; the page
// after them has a snapshot. Numbers that the server has taken and not stored
// are not used again: after a crash of the page nobody here knows of them.
function align(lastSeq, accepted) {
  drop(lastSeq);
  const first = held.length && held[0].seq || session.next;
  const missing = [];
  for (let seq = lastSeq + 1; seq < first; seq++) missing.push({ seq, snap: false, text: toText(customEvent("gap", {})) });
  held = missing.concat(held);
  heldSize = sizeOf(held);
  session.next = Math.max(session.next, accepted + 1);
  sent = 0;
}

function drop(seq) {
  while (held.length && held[0].seq && held[0].seq <= seq) {
    heldSize -= held.shift().text.length;
    sent = Math.max(0, sent - 1);
  }
  session.acked = Math.max(session.acked, seq);
}

function acked(seq) {
  drop(seq);
  if (stored && !held.length) keep(); // the page may want the room
  retries = refusals = 0;
  watch();
  transmit();
  goOn();
}

function transmit() {
  if (!ready) return;
  if (!sent && held.length) watch();
  for (; sent < held.length; sent++) {
    const batch = held[sent];
    batch.seq ||= session.next++;
    socket.send(`{"type":"events_batch","data":{"seq":${batch.seq},"events":[${batch.text}]}}`);
  }
  for (const note of notes.splice(0)) socket.send(note);
}

function refused({ code, message }) {
  if (/^(session_full|session_deleted|too_large)$/.test(code)) halt(forget());
  else if (/^(sequence_gap|too_many_sessions|unavailable)$/.test(code)) { // a new connection says where we stand
    disconnect();
    retries = Math.max(retries, 3);
    retry();
  } else if (code === "not_stored") renew();
  else complain(code, message);
}

// renew begins another session, because the server cannot go on with this one.
function renew() {
  if (++refusals > 3) return halt(forget());
  startOver(newId(), 0);
  session.resume = "";
  ready = false;
  sayStart();
}

// ── window.sessionReplay ─────────────────────────────────────────────────────

function readOptions(given) {
  const all = { ...(script && script.dataset), ...options, ...given };
  const base = all.endpoint ? all.endpoint.replace(/(\/ws)?\/?$/, "/") : script && script.src || "";
  const url = new URL("ws", new URL(base, location.href)); // beside the script
  url.protocol = url.protocol.replace("http", "ws");
  url.search = "?type=tracker" + (all.key ? "&key=" + encodeURIComponent(all.key) : "");
  all.url = url.href;
  all.allowQuery = String(all.allowQuery ?? false) !== "false";
  return all;
}

// One draw a tab, so that a visit is recorded whole or not at all.
function sampled() {
  const rate = options.sampleRate === undefined ? 1 : Number(options.sampleRate);
  if (rate >= 1 || load()) return true;
  let draw = Math.random();
  try {
    draw = Number(sessionStorage.getItem(`${STORE}:draw`) ?? draw);
    sessionStorage.setItem(`${STORE}:draw`, draw);
  } catch { /* one draw a page, then */ }
  return draw < rate;
}

// A frame that a recorded page of the same origin can see into is in its recording.
function isInRecordedPage() {
  try {
    return parent !== window && !!parent.document && !!parent.sessionReplay;
  } catch {
    return false;
  }
}

function start(given) {
  if (wanted || !Socket || isInRecordedPage()) return;
  options = readOptions(given);
  if (navigator.globalPrivacyControl && options.gpc !== "ignore") return;
  const join = (selector, more) => (more ? `${selector}, ${more}` : selector);
  maskSelector = join("[data-replay-mask], textarea, [contenteditable]:not([contenteditable=false i])", options.maskText);
  blockSelector = join("[data-replay-block]", options.blockSelector);
  // These throw if a selector is malformed, or JSON cannot hold what is said of
  // the user: then nothing is recorded.
  document.querySelector(`${maskSelector}, ${blockSelector}`);
  toText([options.user, options.traits]);
  if (!sampled()) return;
  if (document.prerendering) return document.addEventListener("prerenderingchange", safe(() => start(given)), { once: true });
  wanted = true;
  listen();
  begin().catch(complain);
  startRecorder();
}

function stop() {
  if (!wanted) return;
  safe(picture.look)();
  endRecorder();
  flush();
  forget();
  if (ready) say("session_end", { sessionId: session.id });
  halt(); // closing sends what was given to the socket before
}

function identify(user, traits) {
  toText([user, traits]); // throws here, rather than at each session_start
  for (const known of [options, session || {}]) {
    known.user = user || known.user;
    known.traits = { ...known.traits, ...traits };
  }
  news = true;
  if (ready) sayStart();
}

window.sessionReplay = {
  start: safe(start),
  stop: safe(stop),
  identify: safe(identify),
  event: safe((name, payload) => { if (wanted) push(customEvent(String(name), payload)); }),
  get sessionId() { return session ? session.id : null; },
};

if (!script || script.dataset.autostart !== "false") window.sessionReplay.start();
