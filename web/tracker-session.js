// The part of the tracker that knows the tab's session. sessionStorage carries it
// over reloads and navigations. A duplicated tab has a copy of that; a Web Lock
// tells which of the two goes on with the session. Without Web Locks (insecure
// origins) the duplicate takes it over: the server closes the other's connection,
// and that one stops.

const QUOTA = 2 << 20; // UTF-16 units of batches in sessionStorage
const IDLE_MS = 30 * 60000; // a page that loads after this begins a new session
const LOCK_MS = 3000; // how long a page waits for what the one before it holds
const STORE = "session-replay";
const VISITOR = [1, 2, 3, 5, 6, 7, 12, 14]; // what a visitor does, or a script that scrolls, plays or sets a field

let session = null; // what the tab's pages hand on: see newSession
let unlock = () => {}; // lets another page of the tab have the session
let turn = 0; // raised when a begin() that waits is of no use any more
let stored = false; // sessionStorage has batches

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
// that the next page misses what does not fit, and records a gap. A page that is
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

// lock tells whether this page has the session now. The page before it may hold
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

// remembered gives what a storage has under a name; otherwise value, which it puts there.
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
