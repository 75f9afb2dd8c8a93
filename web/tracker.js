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
// What goes wrong here never reaches the page's own code: functions that the page calls
// go through safe(), and so do listeners that may throw.
if (window.sessionReplay && window.sessionReplay.start) return; // embedded twice

const script = document.currentScript || document.querySelector('script[src*="/tracker.js"]');
const { record } = rrwebRecord;
const { stringify } = JSON; // pages replace such things; these are from before
const { WebSocket: Socket, Event: PlainEvent, File: PlainFile, fetch } = window;

let options = { ...(script && script.dataset) };
let wanted = false; // between start() and stop()
let listeners = null; // an AbortController: ends every listener at once
let reason = "not-started"; // why nothing is recorded, or arrives
let troubles = 0; // exceptions of the recorder's own

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

// on listens while recording goes on. It calls the prototype's method, because pages
// replace window.addEventListener too.
function on(target, type, f, capture = false) {
  EventTarget.prototype.addEventListener.call(target, type, f, { capture, signal: listeners.signal });
}

// ── Time ─────────────────────────────────────────────────────────────────────
// A page may have a Date of its own, and a clock may be set: within a page time
// goes on by the browser's monotonic clock, from the time of day at its start or,
// if that is later, from the last event of its session. An Event has the one clock, a
// File the other, which pages leave alone.

const sinceStart = getter(PlainEvent, "timeStamp");
const monotonic = () => sinceStart(new PlainEvent(""));
const timeOfDay = () => new PlainFile([], "").lastModified;
let origin = timeOfDay() - monotonic();

function now() { return Math.round(origin + monotonic()); }
function setClock(last = 0) { origin = Math.max(timeOfDay(), last) - monotonic(); }

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

// explain keeps the reason why nothing is recorded, and tells it to the page's developer.
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
