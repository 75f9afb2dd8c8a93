// The part of the tracker that brings to the server what tracker-record.js has recorded.
// A batch is held until the server has acked it, and sent again on each new
// connection; the server knows by its number what it has already.

const SILENCE_MS = 30000; // without a session_ready or an ack: the connection is dead
const RETRY_MS = 500, RETRY_MAX_MS = 30000;
const POST_MS = 1000, POST_SIZE = 500000; // between two POSTs; UTF-16 units that one has, so that proxies let it pass
const POSTS_MS = 3 * 60000; // of POSTs, until a WebSocket is tried again
const LAST_SIZE = 60000; // bytes: browsers let a fetch outlive its page up to 64 KiB
const PACK_SIZE = 800000; // UTF-16 units of JSON; of more the compressed text would not fit into LAST_SIZE
const TELL_MS = 5000; // between two messages about pages and clicks

let held = []; // batches and errors that are not acked: {seq (0: not numbered yet), snap, text, kind (of an error)}
let limit = (32 << 20) - (64 << 10); // bytes that one message may have
let socket = null, ready = false, readyAt = 0;
let newsTimer = 0; // set while something is to be said that the last session_start did not have
let sent = 0; // how many of held went over this connection
let retries = 0, retryTimer = 0, silence = 0, refusals = 0;

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

// watch gives the connection up when the server owes an answer for too long, and has
// recording go on when a full buffer is half empty.
function watch() {
  if (fullSince && heldSize() < BUFFER / 2) mendSoon();
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
  const pause = Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** retries++);
  if (retries === 3 && navigator.onLine && session && session.unopened > 0) explain("blocked");
  retryTimer = setTimeout(safe(connect), pause * (0.5 + Math.random() / 2));
}

function closed(code) {
  if (ready && now() - readyAt > 10000) retries = 0;
  if (navigator.onLine) session.unopened++;
  if (code === 4001) return halt("taken over"); // by another page, which has its storage
  if (code === 4004) return endSession("refused: deleted");
  if (code === 1009) return sendLess();
  reconnect();
}

// sendLess follows a message that the server finds too large: it becomes a gap,
// and a snapshot of half its size is to follow.
function sendLess() {
  const largest = held.reduce((a, b) => (b.text.length > a.text.length ? b : a), { text: "" });
  limit = Math.min(limit, bytesOf(largest.text)) / 2;
  if (limit < 50000) return endSession("refused: too_large");
  Object.assign(largest, { text: toText(customEvent("gap", {})), snap: false });
  reconnect();
  takeSnapshot();
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
