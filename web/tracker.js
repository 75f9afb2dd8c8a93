// tracker.js records the page that embeds it. The server serves it behind rrweb's
// recorder and the other tracker-*.js, all in one function: rrwebRecord is a
// local name here, no global.
//
//   <script src="https://replay.example.com/tracker.js" async data-user="ann"></script>
//
// README.md has the options (data- attributes or, like maskText, in
// sessionReplay.start({…})) and window.sessionReplay.
//
// What somebody typed never leaves the page, wherever the page repeats it, from
// four characters up. The page knows only what was typed into it since recording
// began: what a next page shows of it must be marked with data-replay-mask. One
// attribute makes an exception, of the field it stands on (an input, a text area, an
// editor): what is typed into <input data-replay-show> is in the recording, readable
// for everybody who may watch it, letter by letter, with what was deleted again. So it
// is for search words, never for names, addresses or free text. Passwords and
// hidden fields are never shown. What the owner gives to event() and identify() is
// recorded as it is.
//
// What goes wrong here never reaches the page: every way in goes through safe().
if (window.sessionReplay && window.sessionReplay.start) return; // embedded twice

const script = document.currentScript || document.querySelector('script[src*="/tracker.js"]');
const { record } = rrwebRecord;
const { stringify } = JSON; // pages replace such things; these are from before
const { WebSocket: Socket, Event: PlainEvent, File: PlainFile, fetch } = window;

const FLUSH_MS = 500, FIRST_FLUSH_MS = 100; // first: until there is an ack
const BUFFER = 16 << 20; // UTF-16 units of JSON that may wait for an ack, the newest full snapshot apart
const QUOTA = 2 << 20; // UTF-16 units of them in sessionStorage
const IDLE_MS = 30 * 60000; // a page that loads after this begins a new session
const CHECKOUT_MS = 5 * 60000;
const LOCK_MS = 3000; // how long a page waits for what the one before it holds
const SILENCE_MS = 30000; // without a session_ready or an ack: the connection is dead
const RETRY_MS = 500, RETRY_MAX_MS = 30000;
const BATCH_SIZE = 250000; // UTF-16 units, but for larger events: sessionStorage has whole batches
const POST_MS = 1000, POST_SIZE = 500000; // between two POSTs; what one has, so that proxies let it pass
const POSTS_MS = 3 * 60000; // of POSTs, until a WebSocket is tried again
const LAST_SIZE = 60000; // bytes: browsers let a fetch outlive its page up to 64 KiB
const PACK_SIZE = 800000; // UTF-16 units of JSON; more of it would not become so small
const MAX_ERRORS = 100; // a page, so that a loop of errors cannot flood
const MEND_MS = 10000; // between two snapshots that mend what an exception, or a full buffer, broke
const TELL_MS = 5000; // between two messages about pages and clicks
const LEFT_OUT = "data:,left-out"; // stands for a data: address that was too large to be sent
const STORE = "session-replay";

// rrweb's event types, and the sources of its incremental events, that matter here.
const FULL = 2, INCREMENTAL = 3, META = 4, CUSTOM = 5;
const MUTATION = 0, CLICKS = 2, INPUT = 5, CANVAS = 9, ADOPTED = 15;
const VISITOR = [1, 2, 3, 5, 6, 7, 12, 14]; // what a visitor does: mouse, touch, scroll, input, media, selection

let options = { ...(script && script.dataset) };
let wanted = false; // between start() and stop()
let stopRecorder = null;
let listeners = null; // an AbortController: ends every listener at once
let session = null; // what the tab's pages hand on: see newSession
let reason = "not-started"; // why nothing is recorded, or arrives
let troubles = 0, mendTimer = 0, mendedAt = -Infinity; // exceptions of the recorder's own
let unlock = () => {};
let turn = 0; // raised when a begin() that waits is of no use any more
let held = []; // batches and errors that are not acked: {seq (0: not sent yet), snap, text, kind (of an error)}
let noted = 0; // errors
let pending = "", flushTimer = 0; // the next batch's events
let snapshotSize = 0, snapshotAt = 0; // of the newest full snapshot
let limit = (32 << 20) - (64 << 10); // bytes that one message may have
let fullSince = 0; // when the buffer was full, and recording stopped
let socket = null, ready = false, readyAt = 0;
let stored = false; // sessionStorage has batches
let newsTimer = 0; // set while something is to be said that the last session_start did not have
let sent = 0; // how many of held went over this connection
let retries = 0, retryTimer = 0, silence = 0, refusals = 0;

const complain = (...what) => console.debug("session-replay:", ...what);

function trouble(error) {
  troubles++;
  complain(error);
}

function safe(f, failed = trouble) {
  return (...args) => {
    try {
      return f(...args);
    } catch (error) {
      return failed(error);
    }
  };
}

// on listens while recording goes on. The prototype's own, because pages replace
// window.addEventListener too.
function on(target, type, f, capture = false) {
  EventTarget.prototype.addEventListener.call(target, type, f, { capture, signal: listeners.signal });
}

// ── Time ─────────────────────────────────────────────────────────────────────
// A page may have a Date of its own, and a clock may be set: within a page time
// goes on by the browser's monotonic clock, from the time of day at its start or,
// if that is later, from the last event of its session. Events and files carry
// both clocks where no page has its hands.

const sinceStart = getter(PlainEvent, "timeStamp");
const monotonic = () => sinceStart(new PlainEvent(""));
const timeOfDay = () => new PlainFile([], "").lastModified;
let origin = timeOfDay() - monotonic();

function now() { return Math.round(origin + monotonic()); }
function setClock(last = 0) { origin = Math.max(timeOfDay(), last) - monotonic(); }

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
  if (isLeft(event)) startAfresh();
  event.timestamp = now(); // rrweb asks the page's Date
  const { type, data } = event;
  if (type === META) guardForms();
  if (data.positions) for (const at of data.positions) at.timeOffset = Math.max(-500, Math.min(0, at.timeOffset));
  if (type === INCREMENTAL) notePage();
  safe(picture.complete)(event);
  if (!clean(event)) return; // if it throws, the event is not recorded
  if (data.source === CLICKS && data.type === 2) {
    if (session) session.clicks++;
    tell();
  }
  push(event);
  picture.took(event);
  if (type === INCREMENTAL && now() - snapshotAt > CHECKOUT_MS) takeSnapshot();
}, mend);

function startRecorder() {
  const starting = stopRecorder = () => {}; // rrweb emits before it returns, and may be ended then
  snapshotAt = 0;
  const stop = record({
    emit,
    recordAfter: "DOMContentLoaded",
    maskInputOptions: { input: true, textarea: true, select: true }, // by element: every type of input
    maskInputFn: maskInput,
    ignoreSelector: IGNORED,
    slimDOMOptions: "all", // notePage tells of titles
    sampling: { scroll: 150, media: 800, canvas: Number(options.recordCanvas) || undefined },
    recordCanvas: Number(options.recordCanvas) > 0,
    dataURLOptions: { type: "image/webp", quality: 0.7 },
    // Pages rely on the DOMExceptions of what rrweb wraps (insertRule and the
    // like); any other error in there is rrweb's own.
    errorHandler: (error) => !(error instanceof DOMException) && mend(error),
  });
  if (!stop) {
    stopRecorder = null;
    explain("failed");
  } else if (stopRecorder === starting) stopRecorder = safe(stop);
  else stop();
}

// mend counts an exception within the recorder. What it has broken a full
// snapshot makes whole.
function mend(error) {
  trouble(error);
  mendSoon();
  return true;
}

function mendSoon() {
  mendTimer = mendTimer || setTimeout(safe(() => {
    mendTimer = 0;
    mendedAt = now();
    if (fullSince) goOn();
    else takeSnapshot();
  }), Math.max(0, mendedAt + MEND_MS - now()));
}

// A form with a field named nodeType, or fields named host and mode, is none
// that rrweb can walk past.
function isUnreadable(node) {
  const { attributes } = node;
  return typeof node.nodeType !== "number" || typeof node.ELEMENT_NODE !== "number" || "host" in node && "mode" in node
    || attributes !== attributesOf(node) && attributes.length > 0;
}

const unreadable = new Map(); // such forms, as the newest snapshot found them → what stands for them
function leaveOut(form) {
  const { width, height } = boxOf(form), mark = document.createElement("form");
  mark.setAttribute("data-replay-left-out", "form");
  mark.setAttribute("rr_width", `${width}px`);
  mark.setAttribute("rr_height", `${height}px`);
  unreadable.set(form, mark);
  record.mirror.add(form, { id: -2 }); // rrweb's word for what it passes over
}

// rrweb keeps for good the getter of childNodes that it finds at its first
// snapshot: here it finds one that puts a mark in the place of such forms. It
// would look elsewhere if it saw Zone.js.
let guarded = false;
function guardForms() {
  unreadable.clear();
  for (const form of byTag(document, "form")) if (isUnreadable(form)) leaveOut(form);
  if (guarded) return;
  guarded = true;
  const theirs = Object.getOwnPropertyDescriptor(Node.prototype, "childNodes"), list = own(theirs.get);
  const { Zone } = window;
  function get() {
    return unreadable.size ? Array.from(list(this), (child) => unreadable.get(child) || child) : list(this);
  }
  get.toString = () => "[native code]"; // what rrweb looks for
  Object.defineProperty(Node.prototype, "childNodes", { ...theirs, get });
  if (Zone) window.Zone = undefined;
  Promise.resolve().then(() => { // no script of the page's runs before
    Object.defineProperty(Node.prototype, "childNodes", theirs);
    if (Zone) window.Zone = Zone;
  });
}

function endRecorder() {
  if (stopRecorder) stopRecorder();
  stopRecorder = null;
}

const takeSnapshot = safe(() => { if (stopRecorder && snapshotAt) record.takeFullSnapshot(true); }, mend);

const customEvent = (tag, payload) => ({ type: CUSTOM, data: { tag, payload }, timestamp: now() });

const isPlain = (text) => text.length * 3 < limit || !/[^\0-\x7f]/.test(text);
const bytesOf = (text) => (isPlain(text) ? text.length : new Blob([text]).size);

// fitted gives the text of an event that one message can hold: of a larger one
// the largest data: addresses are left out.
function fitted(event) {
  let text = toText(event), size;
  for (let most = limit >> 1; (size = bytesOf(text)) > limit && most > 1000; most >>= 2) {
    text = text.replace(/data:[^\s"'()<>\\]+/g, (found) => (found.length > most ? LEFT_OUT : found));
  }
  return size > limit ? null : text;
}

// tooLarge: without its snapshot nothing can be watched. What says so is recorded.
function tooLarge() {
  explain("too-large");
  endRecorder();
  push(customEvent("too-large", { limit }));
  flush();
}

function push(event) {
  if (fullSince) return;
  const text = fitted(event);
  if (text === null) return event.type === FULL ? tooLarge() : mend(new Error("an event larger than a message"));
  if (heldSize() + pending.length > BUFFER + snapshotSize) return bufferFull();
  const snap = event.type === FULL; // its batch begins with its Meta
  if (event.type === META || !snap && pending.length + text.length > Math.min(limit / 4, BATCH_SIZE)) flush();
  pending += (pending && ",") + text;
  if (session && (isVisitors(event) || event.timestamp - session.at < IDLE_MS)) session.at = event.timestamp;
  if (snap) {
    [snapshotSize, snapshotAt] = [pending.length, event.timestamp];
    flush(snap);
  } else {
    const pause = session && session.acked ? FLUSH_MS : FIRST_FLUSH_MS;
    flushTimer = flushTimer || setTimeout(safe(() => { noteMissed(); flush(); }), pause);
  }
}

// What controls hold, by id, as it was recorded last. Frameworks set values past
// every setter, and a form's reset() is no event of its fields.
const controls = new Map();
const noteControl = (id, el) => controls.set(id, toState(el));
const toState = (el) => ({ text: maskValue(el.value, el), isChecked: !!el.checked });

function noteMissed() {
  notePage();
  for (const [id, was] of controls) {
    const el = nodeOf(id), is = el && toState(el);
    if (!el) controls.delete(id);
    else if (is.text !== was.text || is.isChecked !== was.isChecked) {
      maskInput(el.value, el);
      emit({ type: INCREMENTAL, data: { source: INPUT, ...is, id } });
    }
  }
}

function flush(snap = false) {
  clearTimeout(flushTimer);
  flushTimer = 0;
  if (!pending) return;
  held.push({ seq: 0, snap, text: pending });
  pending = "";
  transmit();
  pack();
}

const heldSize = () => held.reduce((sum, { text }) => sum + text.length, 0);
const numbered = () => held.map((batch) => { batch.seq = batch.seq || session.next++; return batch; });

// A full buffer stops the recorder: what is held stays playable. Once half of it is
// acked it goes on, with a word about the gap and a fresh snapshot.
function bufferFull() {
  fullSince = now();
  flush();
  endRecorder();
}

function goOn() {
  const gap = customEvent("gap", { from: fullSince, to: now() });
  fullSince = 0;
  push(gap);
  startRecorder();
}

// notePage looks at the address and the title, with every event and where none tells.
let page = {}, lastAddress, lastTitle;
function notePage() {
  const title = titleOf(document);
  if (location.href === lastAddress && title === lastTitle) return;
  [lastAddress, lastTitle] = [location.href, title];
  const { href: before, title: named } = page;
  page = { href: cutAddress(lastAddress, document), title: hide(title) };
  if (!before || page.href === before && page.title === named) return;
  if (page.href !== before && session) session.pages++;
  tell();
  push(page.href !== before ? customEvent("navigation", page) : customEvent("title", { title: page.title }));
}

// tell says soon, with another session_start, what lists show of a session.
function tell() {
  newsTimer = newsTimer || setTimeout(safe(sayNews), TELL_MS);
}

function sayNews() {
  if (!newsTimer || !ready) return;
  clearTimeout(newsTimer);
  newsTimer = 0;
  sayStart();
}

function noteError(type, error, data) {
  if (++noted > MAX_ERRORS) return;
  Object.assign(data, { stack: error && error.stack, timestamp: now() });
  for (const [key, value] of Object.entries(data)) {
    if (typeof value === "string") data[key] = cleanWords(value).slice(0, 8192);
  }
  data.url = cutAddress(location.href, document);
  held.push({ seq: 0, kind: type, text: toText(data) });
  transmit();
}

function listen() {
  listeners = new AbortController();
  const listenFor = (target, type, f, capture) => on(target, type, safe(f), capture);
  listenFor(window, "error", (e) => {
    const { message, filename, lineno, colno, error } = e;
    if (script && filename === script.src && !(error instanceof DOMException)) return mend(error); // rrweb's own
    if (message) noteError("javascript_error", error, { message, filename, lineno, colno });
  });
  listenFor(window, "unhandledrejection", ({ reason }) => {
    noteError("promise_rejection", reason, { reason: String(reason && reason.message || reason) });
  });
  for (const type of ["popstate", "hashchange"]) listenFor(window, type, notePage);
  if (window.navigation instanceof EventTarget) listenFor(navigation, "currententrychange", notePage);
  listenFor(document, "visibilitychange", () => {
    const hidden = isHidden(document);
    push(customEvent("visibility", { hidden }));
    if (ready) socket.send(toText({ type: "visibility_change", data: { hidden, timestamp: now() } }));
    if (hidden) keep();
    else if (!socket) connect();
  }, true);
  listenFor(window, "pagehide", leave, true);
  listenFor(window, "pageshow", (e) => { if (e.persisted) comeBack(); }, true);
  listenFor(window, "online", () => { if (!ready) { disconnect(); connect(); } });
  listenFor(window, "offline", reconnect);
  hearTyping(window);
  picture.begin();
}

// ── The tab's session ────────────────────────────────────────────────────────
// sessionStorage carries it over reloads and navigations. A duplicated tab has a
// copy of that; a Web Lock tells which of the two goes on with the session.
// Without Web Locks (insecure origins) the duplicate takes it over: the server
// closes the other's connection, and that one stops.

const newId = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

function load() {
  try {
    const saved = JSON.parse(sessionStorage.getItem(STORE));
    return saved && timeOfDay() - saved.at < IDLE_MS ? saved : null;
  } catch {
    return null;
  }
}

// keep stores what a next page needs. Every batch has its number by then, so
// that what does not fit is missed there, and said to be a gap. A page that is
// left before it has its session adds to what the page before it kept. Where
// nothing can be stored the next page begins another session.
function keep(leaving = false) {
  noteMissed();
  flush();
  const tab = session || leaving && load();
  if (!tab) return;
  const all = session ? numbered() : (tab.held || []).concat(held);
  const fitting = oldest(all, QUOTA, ({ text }) => text.length);
  for (const some of [fitting, []]) {
    try {
      sessionStorage.setItem(STORE, toText({ ...tab, held: some }));
      stored = some.length > 0;
      return;
    } catch { /* the page has used the space, or there is none */ }
  }
  forget();
}

const forget = safe(() => sessionStorage.removeItem(STORE));

// lock gives whether this page has the session now. The page before it may hold
// the lock for a moment still, and store something more.
function lock(id) {
  const mine = turn, patience = new AbortController();
  setTimeout(() => patience.abort(), LOCK_MS);
  return new Promise((done) => {
    navigator.locks.request(`${STORE}:${id}`, { signal: patience.signal }, () => {
      done(mine === turn);
      return mine === turn && new Promise((release) => { unlock = release; });
    }).catch(({ name }) => done(name !== "AbortError")); // no locks here: as if there were no API
  }).catch(() => true);
}

// newSession makes the session's token, too: what a page sends when it is left
// before the server has answered, the next page can go on with.
function newSession() {
  const id = newId();
  lock(id);
  return { id, resume: newId(), started: now(), at: now(),
    entry: page.href, title: page.title, referrer: cutAddress(referrerOf(document)),
    next: 1, acked: 0, // numbers of batches
    page: 0, first: 1, // the page's number in its tab, and its first batch's
    pages: 0, clicks: 0, // as lists show them
    unopened: 0, socketAt: 0 }; // WebSockets in a row that could not be opened; when one is tried again
}

// begin finds the tab's session, while the recorder already fills held.
async function begin() {
  const mine = ++turn, saved = load();
  const { held: before = [], ...found } = saved && await lock(saved.id) && load() || {};
  if (mine !== turn) return; // left or stopped meanwhile
  held = before.concat(held);
  stored = before.length > 0;
  goOnWith(found.id ? found : newSession());
}

function goOnWith(found) {
  session = found;
  session.pages++;
  session.page++;
  session.first = session.next;
  session.user = options.user || session.user || visitor();
  session.traits = { ...session.traits, ...options.traits };
  connect();
  pack();
}

// A tab is left when nothing happens for long: what its visitor does then begins
// another session. A computer that sleeps stops the monotonic clock.
const isVisitors = ({ type, data }) => type === INCREMENTAL && VISITOR.includes(data.source);
const isLeft = (event) => session && isVisitors(event) && !held.length && !pending
  && (now() - session.at > IDLE_MS || timeOfDay() - now() > IDLE_MS);

function startAfresh() {
  if (ready) socket.send(END);
  disconnect();
  letGo();
  setClock();
  goOnWith(newSession());
  takeSnapshot();
}

// leave leaves all that is held to the next page, which may be this one again,
// from the back/forward cache.
function leave() {
  keep(true);
  if (session) sendLast();
  sayNews();
  disconnect();
  letGo();
  session = null;
  held = [];
}

function letGo() {
  turn++;
  unlock();
}

function comeBack() {
  setClock((load() || {}).at);
  begin().catch(complain);
  takeSnapshot();
}

// remembered gives what a storage has of a name; otherwise value, and puts it there.
function remembered(storage, name, value) {
  try {
    const stored = window[storage], key = `${STORE}:${name}`;
    value = stored.getItem(key) || value;
    stored.setItem(key, value);
  } catch { /* there is none, or no room: another page will not know */ }
  return value;
}

// visitor is a random name for this browser on this site; nothing is measured.
function visitor() {
  return options.visitor === "off" ? undefined : remembered("localStorage", "visitor", `visitor_${newId()}`);
}

// ── Delivery ─────────────────────────────────────────────────────────────────
// A batch is held until the server has acked it, and sent again on each new
// connection; the server knows by its number what it has already.

const END = '{"type":"session_end","data":{}}';

function startText() {
  const { id, resume, acked, page: nth, first, started, entry, title, referrer, user, traits, pages, clicks } = session;
  return toText({ type: "session_start", data: {
    sessionId: id, resume, create: !acked, page: nth, firstSeq: first,
    userId: user, traits, startTime: started, url: entry, title, referrer,
    lastUrl: page.href, lastTitle: page.title, pages, clicks, userAgent: navigator.userAgent,
    viewport: { width: innerWidth, height: innerHeight, devicePixelRatio },
    timeZone: Intl.DateTimeFormat().resolvedOptions().timeZone,
  } });
}

const sayStart = () => socket.send(startText());

const batchText = ({ seq, kind, text }) => (kind ? `{"type":"${kind}","data":{"seq":${seq},${text.slice(1)}}`
  : `{"type":"events_batch","data":{"seq":${seq},"events":[${text}]}}`);

function connect() {
  if (socket || !wanted || !session) return;
  clearTimeout(retryTimer);
  let opened;
  try {
    opened = socket = session.unopened > 1 && navigator.onLine ? poster() : new Socket(options.url);
  } catch { // ws: from an https: page, for one
    return closed();
  }
  opened.onopen = safe(() => {
    if (opened !== socket) return;
    session.unopened = -1; // its end makes it 0
    sayStart();
  });
  opened.onmessage = safe((e) => { if (opened === socket) receive(JSON.parse(e.data)); });
  opened.onclose = safe((e) => { if (opened === socket) closed(e.code); });
  watch();
}

// poster is a connection by HTTP, with a socket's ways, for networks that refuse
// WebSockets: what it is given goes with the next POST. A WebSocket is tried again
// when the first POST is answered, because the server may just have been away, and
// then every few minutes.
function poster() {
  const cancel = new AbortController();
  let lines = [], timer = setTimeout(safe(post)); // set, too, while a POST is under way
  const made = { post: true, readyState: 1,
    send(line) { lines.push(line); timer = timer || setTimeout(safe(post), POST_MS); },
    close() { clearTimeout(timer); cancel.abort(); } };
  function post() {
    const some = lines.splice(0, oldest(lines, POST_SIZE, (line) => line.length).length || 1);
    if (!some.length || !some[0].startsWith('{"type":"session_start"')) some.unshift(startText());
    fetch(options.posts, { method: "POST", body: some.join("\n"), signal: cancel.signal })
      .then(async (answer) => { answered(answer.status, await answer.text()); })
      .catch(safe(() => {
        if (made !== socket) return;
        session.unopened = 0;
        closed();
      }));
  }
  function answered(status, text) {
    if (made !== socket) return;
    if (status === 413) return sendLess();
    if (status === 401 || status === 403) return halt(`refused: ${status === 401 ? "key" : "origin"}`);
    for (const line of text.split("\n")) if (line && made === socket) receive(JSON.parse(line));
    if (made !== socket) return;
    timer = lines.length && setTimeout(safe(post), POST_MS);
    if (status !== 200) closed();
    else if (now() > session.socketAt) {
      Object.assign(session, { socketAt: now() + POSTS_MS, unopened: 1 });
      retries = 0;
      reconnect();
    }
  }
  return made;
}

// oldest gives the first of a list that there is room for, without a hole.
const oldest = (list, room, sizeOf) => list.filter((one) => (room -= sizeOf(one)) >= 0);

const unacked = (...more) => [startText(), ...numbered().map(batchText), ...more];

// pack compresses what waits for a session's first ack, a page's first snapshot for
// one, for a last POST: when the page is left it is too late to begin with that.
let packed = {};
const pack = () => packNow().catch(() => {}); // old browsers cannot
async function packNow() {
  const size = heldSize();
  if (!session || ready || session.acked || size < LAST_SIZE / 2 || size > PACK_SIZE) return;
  const { id } = session, text = new Blob([unacked().join("\n")]);
  packed = { id, body: await new Response(text.stream().pipeThrough(new CompressionStream("gzip"))).blob() };
}

// sendLast sends what has no ack by a fetch that outlives the page; if that is too
// much, what was packed before, or what the WebSocket has not been given.
function sendLast(...more) {
  const lines = unacked(...more), isTooMuch = new Blob(lines).size + lines.length > LAST_SIZE;
  if (isTooMuch && ready && !socket.post) lines.splice(1, sent);
  const fitting = oldest(lines, LAST_SIZE, (line) => new Blob([line]).size + 1);
  const isPacked = isTooMuch && !ready && packed.id === session.id && packed.body.size <= LAST_SIZE;
  if (!isPacked && fitting.length < 2) return;
  const body = isPacked ? packed.body : fitting.join("\n");
  fetch(options.posts, { method: "POST", body, keepalive: true }).catch(() => {});
}

// watch gives the connection up when the server owes an answer for too long.
function watch() {
  clearTimeout(silence);
  if (socket && (!ready || held.length)) silence = setTimeout(safe(() => closed()), SILENCE_MS);
}

function disconnect() {
  clearTimeout(retryTimer);
  clearTimeout(silence);
  const closing = socket;
  socket = null;
  ready = false;
  if (closing) closing.close();
}

function reconnect() {
  disconnect();
  retry();
}

function retry() {
  if (!wanted) return;
  const pause = Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** retries++);
  if (retries === 3 && navigator.onLine && session && session.unopened > 0) explain("blocked");
  clearTimeout(retryTimer);
  retryTimer = setTimeout(safe(connect), pause * (0.5 + Math.random() / 2));
}

function closed(code) {
  if (ready && now() - readyAt > 10000) retries = 0;
  if (navigator.onLine) session.unopened++;
  disconnect();
  if (code === 4001) return halt("taken over"); // by another page, which has its storage
  if (code === 4004) return endSession("refused: deleted");
  if (code === 1009) return sendLess();
  retry();
}

// sendLess follows a message that the server finds too large: it becomes a gap,
// and a snapshot of half its size is to follow.
function sendLess() {
  const largest = held.reduce((a, b) => (b.text.length > a.text.length ? b : a), { text: "" });
  limit = Math.min(limit, bytesOf(largest.text)) / 2;
  if (limit < 50000) return endSession("refused: too_large");
  Object.assign(largest, { text: toText(customEvent("gap", {})), snap: false });
  disconnect();
  takeSnapshot();
  retry();
}

// endSession ends the tab's session, too: its next page begins another.
function endSession(why) {
  forget();
  halt(why);
}

// halt ends recording, until the next page load unless start() is called.
function halt(why) {
  explain(why);
  wanted = false;
  endRecorder();
  if (listeners) listeners.abort();
  disconnect();
  letGo();
  for (const timer of [flushTimer, mendTimer, newsTimer]) clearTimeout(timer);
  session = null;
  held = [];
  pending = "";
  flushTimer = fullSince = mendTimer = newsTimer = 0;
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
  else if (accepted + 1 < nextSeq() && retries < 4) return reconnect(); // a last POST may bring what is missing
  else align(lastSeq, accepted);
  ready = true;
  if (stopRecorder || fullSince) reason = "";
  readyAt = now();
  sayNews();
  transmit();
  watch();
}

// startOver turns what is held into the beginning of another session: it can
// be played from the first full snapshot on.
function startOver(id, lastSeq) {
  flush();
  unlock();
  lock(id);
  const first = held.findIndex((batch) => batch.snap);
  held = held.filter((batch, i) => batch.kind || first >= 0 && i >= first);
  for (const batch of held) batch.seq = 0;
  Object.assign(session, { id, next: lastSeq + 1, first: lastSeq + 1, acked: lastSeq, started: now() });
  sent = 0;
  if (first < 0) takeSnapshot();
}

const nextSeq = () => held.length && held[0].seq || session.next;

// align makes what is held go on where the server stands. Numbers of batches
// that did not fit into storage are used up with a word about the gap; the page
// after them has a snapshot. Numbers that the server has taken and not stored
// are not used again: after a crash of the page nobody here knows of them.
function align(lastSeq, accepted) {
  drop(lastSeq);
  const missing = [];
  for (let seq = lastSeq + 1; seq < nextSeq(); seq++) missing.push({ seq, text: toText(customEvent("gap", {})) });
  held = missing.concat(held);
  session.next = Math.max(session.next, accepted + 1);
  sent = 0;
}

function drop(seq) {
  while (held.length && held[0].seq && held[0].seq <= seq) {
    held.shift();
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
  if (fullSince && heldSize() < BUFFER / 2) mendSoon();
}

function transmit() {
  if (!ready || socket.readyState !== 1) return; // Firefox closes it before pagehide
  if (!sent && held.length) watch();
  for (numbered(); sent < held.length; sent++) socket.send(batchText(held[sent]));
}

function refused({ code, message }) {
  if (/^session_(full|deleted)$/.test(code)) endSession(`refused: ${code}`);
  else if (code === "taken") halt("taken over");
  else if (code === "later_page") endSession("taken over"); // by a copy of this tab
  else if (code === "too_large") sendLess();
  else if (/^(sequence_gap|too_many_sessions|unavailable)$/.test(code)) { // a new connection says where we stand
    if (code !== "sequence_gap") explain(`refused: ${code}`);
    retries = Math.max(retries, 3);
    reconnect();
  } else if (code === "not_stored") renew();
  else complain(code, message);
}

// renew begins another session, because the server cannot go on with this one.
function renew() {
  if (++refusals > 3) return endSession("refused: not_stored");
  startOver(newId(), 0);
  session.resume = newId();
  ready = false;
  sayStart();
}

// ── window.sessionReplay ─────────────────────────────────────────────────────

function readOptions(given) {
  const all = { ...options, ...given };
  const base = all.endpoint ? all.endpoint.replace(/(\/ws)?\/?$/, "/") : script && script.src || "";
  const url = new URL("ws", new URL(base, location.href)); // beside the script
  url.protocol = url.protocol.replace("http", "ws");
  url.search = "?type=tracker" + (all.key ? "&key=" + encodeURIComponent(all.key) : "");
  all.url = url.href;
  all.posts = url.href.replace("ws", "http");
  all.allowQuery = all.allowQuery != null && String(all.allowQuery) !== "false";
  return all;
}

// One draw a tab, so that a visit is recorded whole or not at all.
function sampled() {
  const rate = options.sampleRate === undefined ? 1 : Number(options.sampleRate);
  return rate >= 1 || !!load() || Number(remembered("sessionStorage", "draw", Math.random())) < rate;
}

// A frame is in the recording of a page around it that is recorded and can see into it.
function isInRecordedPage(frame = window) {
  try {
    const { parent } = frame, { sessionReplay } = parent; // this throws if it may not see it
    return parent !== frame && (!!sessionReplay && sessionReplay.state.recording || isInRecordedPage(parent));
  } catch {
    return false;
  }
}

// explain keeps the reason why nothing is recorded, and tells who develops the page.
function explain(why) {
  reason = why;
  const { debug = false } = options;
  if (why && (String(debug) !== "false" || /^(localhost|127\..*|\[::1\])$/.test(location.hostname))) {
    console.info(`session-replay: ${why}`);
  }
}

// why tells what keeps events from being recorded, or from arriving.
function why() {
  if (!wanted || !stopRecorder || ready) return reason;
  return !navigator.onLine ? "offline" : reason || "connecting";
}

function start(given) {
  if (wanted) return;
  options = readOptions(given);
  if (isInRecordedPage()) return explain("recorded by the page around this frame");
  if (navigator.globalPrivacyControl && options.gpc !== "ignore") return explain("gpc");
  maskSelector = ["[data-replay-mask]"].concat(options.maskText || []).join();
  blockSelector = ["[data-replay-block]"].concat(options.blockSelector || []).join();
  // These throw if a selector is malformed, or JSON cannot hold what is said of
  // the user: then nothing is recorded.
  anySelector = `${maskSelector}, ${blockSelector}, ${EDITORS}, :root`; // of a root: its document's designMode
  own(Document.prototype.querySelector)(document, anySelector);
  toText([options.user, options.traits]);
  if (!sampled()) return explain("sampled-out");
  if (document.prerendering === true) {
    return document.addEventListener("prerenderingchange", safe(() => start(given)), { once: true });
  }
  wanted = true;
  reason = "";
  setClock((load() || {}).at);
  page = {}, lastAddress = null;
  notePage();
  listen();
  begin().catch(complain);
  startRecorder();
}

function stop() {
  if (!wanted) return;
  safe(picture.look)(Infinity);
  endRecorder();
  flush();
  if (ready && !socket.post) socket.send(END); // closing sends what a socket was given
  else if (session) sendLast(END);
  endSession("stopped");
}

function identify(user, traits) {
  toText([user, traits]); // throws here, rather than at each session_start
  for (const known of [options, session || {}]) {
    known.user = user || known.user;
    known.traits = { ...known.traits, ...traits };
  }
  tell();
  sayNews();
}

window.sessionReplay = {
  start: safe(start, (error) => { trouble(error); explain("failed"); }),
  stop: safe(stop),
  identify: safe(identify),
  event: safe((name, payload) => { if (wanted) push(customEvent(String(name), payload)); }),
  get sessionId() { return session ? session.id : null; },
  get state() {
    const recording = wanted && !!stopRecorder, waiting = held.length + Number(!!pending);
    const transport = !ready ? "" : socket.post ? "post" : "websocket";
    return { recording, reason: why(), transport, waiting, errors: troubles };
  },
};

if (options.autostart === "false") explain("not-started");
else window.sessionReplay.start();
