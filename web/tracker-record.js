// The part of the tracker that records: rrweb's events, the page's address and
// errors become batches, which tracker-delivery.js holds until they are acked.

const FLUSH_MS = 500, FIRST_FLUSH_MS = 100; // first: until there is an ack
const BUFFER = 16 << 20; // UTF-16 units of JSON that may wait for an ack, the newest full snapshot apart
const CHECKOUT_MS = 5 * 60000;
const BATCH_SIZE = 250000; // UTF-16 units, but for larger events: sessionStorage has whole batches
const MAX_ERRORS = 100; // a page, so that a loop of errors cannot flood
const MEND_MS = 10000; // between two snapshots that mend what an exception, or a full buffer, broke
const LEFT_OUT = "data:,left-out"; // stands for a data: address that was too large to be sent

// rrweb's event types, and the sources of its incremental events, that matter here.
const FULL = 2, INCREMENTAL = 3, META = 4, CUSTOM = 5;
const MUTATION = 0, CLICKS = 2, INPUT = 5, CANVAS = 9, ADOPTED = 15;

let stopRecorder = null;
let mendTimer = 0, mendedAt = -Infinity;
let noted = 0; // errors
let pending = "", flushTimer = 0; // the next batch's events
let snapshotSize = 0, snapshotAt = 0; // of the newest full snapshot
let fullSince = 0; // when the buffer was full, and recording stopped

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
  runs++;
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

// A form with a field named nodeType, or fields named host and mode, is one
// that rrweb cannot read.
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

// rrweb observes a frame's document anew with each full snapshot, and would tell all
// that happens in it once more: it leaves a document alone that has no window. Where
// document.open() has ended its listeners, ours is gone too.
let runs = 0, isObserved;
function hearFrame(doc) {
  const type = `${STORE}:${runs}`;
  hearTyping(viewOf(doc));
  isObserved = false;
  doc.dispatchEvent(new PlainEvent(type));
  if (!isObserved) return on(doc, type, () => { isObserved = true; });
  Object.defineProperty(doc, "defaultView", { value: null, configurable: true });
  Promise.resolve().then(() => delete doc.defaultView); // no script of the page's runs before
}

function endRecorder() {
  if (stopRecorder) stopRecorder();
  stopRecorder = null;
}

const takeSnapshot = safe(() => { if (stopRecorder && snapshotAt) record.takeFullSnapshot(true); }, mend);

const customEvent = (tag, payload) => ({ type: CUSTOM, data: { tag, payload }, timestamp: now() });

const bytesOf = (text) => (text.length * 3 < limit ? text.length : new Blob([text]).size); // exact where it matters

// fitted gives the text of an event that one message can hold: of a larger one
// the largest data: addresses are left out.
function fitted(event) {
  let text = toText(event), size;
  for (let most = limit >> 1; (size = bytesOf(text)) > limit && most > 1000; most >>= 2) {
    text = text.replace(/data:[^\s"'()<>\\]+/g, (found) => (found.length > most ? LEFT_OUT : found));
  }
  return size > limit ? null : text;
}

// tooLarge ends recording: without a snapshot nothing can be watched. An event says so.
function tooLarge() {
  explain("too-large");
  endRecorder();
  push(customEvent("too-large", { limit }));
  flush();
}

function push(event) {
  if (fullSince || !wanted) return;
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

// notePage looks at the address and the title, with every event and when no event comes.
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
