// What both pages need: requests that wait for the server to come back, the
// viewer's WebSocket, and a few words for times and addresses.

export const $ = Object.fromEntries([...document.querySelectorAll('[id]')].map((node) => [node.id, node]));

export async function request(path, options = {}) {
  const response = await fetch(path, { headers: { Accept: 'application/json' }, ...options });
  if (response.status === 401) { // the server answers with the sign-in page
    location.reload();
    return new Promise(() => {});
  }
  if (!response.ok) {
    const { status } = response, { error = `the server answered ${status}` } = await response.json().catch(() => ({}));
    throw Object.assign(new Error(error), { status });
  }
  return response;
}

export const getJSON = async (path) => (await request(path)).json();

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Pauses grow to 15 s and are jittered, so that a server which comes back is
// not met by every open page in the same instant.
const backoff = (attempt) => Math.min(15000, 500 * 2 ** attempt) * (0.6 + 0.4 * Math.random());

// patiently calls work() until it succeeds. Only what time can mend is tried again: no
// network, or a server that is busy or away.
export async function patiently(work, onWait = () => {}) {
  for (let attempt = 0; ; attempt++) {
    try {
      const result = await work();
      if (attempt > 0) onWait(0);
      return result;
    } catch (err) {
      const status = err.status ?? 503;
      if (status < 500 && status !== 429 && status !== 408) throw err;
      const wait = backoff(attempt);
      onWait(wait);
      await pause(wait);
    }
  }
}

// connect keeps a viewer's WebSocket open as long as the page is. onOpen runs after
// every (re)connection, onWait(ms) when one is lost (0: it is back).
export function connect({ onOpen, onMessage, onWait }) {
  let socket, heard, attempt = 0;
  const open = () => {
    heard = Date.now();
    socket = new WebSocket('/ws?type=viewer');
    socket.onopen = () => {
      if (attempt > 0) onWait(0);
      attempt = 0;
      onOpen();
    };
    socket.onmessage = ({ data }) => {
      heard = Date.now();
      const { type, data: body } = JSON.parse(data);
      onMessage(type, body ?? {}, data.length);
    };
    socket.onclose = () => {
      const wait = backoff(attempt++);
      onWait(wait);
      setTimeout(open, wait);
      // A refused handshake does not say why; this turns a lapsed sign-in into the sign-in page.
      request('/stats').catch(() => {});
    };
  };
  const send = (type, data) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, data }));
  };
  // A half-open connection is silent for ever: ask for a sign of life, then give up on it.
  setInterval(() => {
    const silent = Date.now() - heard;
    if (silent > 40000) socket.close();
    else if (silent > 20000) send('get_active_sessions');
  }, 5000);
  open();
  return { send };
}

// el makes an element. Text is only ever set as text: most of it comes from
// recorded pages.
export function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

// write leaves text alone that is there already: somebody may have selected it, or
// a screen reader be reading it.
export function write(node, text) { if (node.textContent !== text) node.textContent = text; }

// clock writes a duration in milliseconds as 1:05 or 2:01:05.
export function clock(ms) {
  const s = Math.max(0, Math.floor((ms || 0) / 1000));
  const rest = `${Math.floor(s / 60) % 60}:${String(s % 60).padStart(2, '0')}`;
  return s < 3600 ? rest : `${Math.floor(s / 3600)}:${rest.padStart(5, '0')}`;
}

// when writes a moment (RFC 3339 or milliseconds) in the reader's own time.
export function when(moment) {
  const date = new Date(moment);
  if (moment == null || Number.isNaN(date.getTime())) return '–';
  const year = date.getFullYear() === new Date().getFullYear() ? undefined : 'numeric';
  return date.toLocaleString(undefined, { year, month: 'short', day: 'numeric', hour: 'numeric', minute: '2-digit' });
}

// words writes anything a page may have sent; String() would throw at some.
export const words = (v) => (typeof v === 'string' ? v : v == null ? '' : JSON.stringify(v));

// ago writes a moment as one says it; older than a day, as when does.
export function ago(moment) {
  const minutes = Math.floor((Date.now() - new Date(moment)) / 60000);
  if (!(minutes < 24 * 60)) return when(moment);
  if (minutes < 1) return 'just now';
  return minutes < 60 ? `${minutes} min ago` : `${Math.floor(minutes / 60)} h ago`;
}

// place shortens a recorded address to what tells pages apart: host and path,
// and the fragment, which may be a route.
export function place(url) {
  const text = words(url);
  try {
    const { host, pathname, hash } = new URL(text);
    return host ? host + pathname + hash : text;
  } catch {
    return text || 'unknown page';
  }
}

// person names a visitor. Made-up ids are long, and mean nothing.
export function person(userId) {
  const text = words(userId);
  const [, short] = /^(?:visitor_(?=[\da-f-]{32})|user_(?=[a-z2-7]{12}$))(\w{4})/.exec(text) ?? [];
  return short ? `Visitor ${short}` : text || 'Somebody';
}

// browser says in words what a user agent string tells: "Chrome 142 · Windows".
const BROWSERS = {
  Edge: /Edg(?:e|A|iOS)?\/(\d+)/, Opera: /OPR\/(\d+)/, 'Samsung Internet': /SamsungBrowser\/(\d+)/,
  Firefox: /(?:Firefox|FxiOS)\/(\d+)/, Chrome: /(?:Chrome|CriOS)\/(\d+)/, Safari: /Version\/(\d+).*Safari/,
};
const SYSTEMS = {
  Windows: /Windows/, iPhone: /iPhone/, iPad: /iPad/, Android: /Android/, ChromeOS: /CrOS/, macOS: /Macintosh|Mac OS X/,
  Linux: /Linux|X11/,
};

export function browser(userAgent) {
  const text = words(userAgent);
  const find = (known) => Object.keys(known).find((name) => known[name].test(text));
  const name = find(BROWSERS);
  return [name && `${name} ${BROWSERS[name].exec(text)[1]}`, find(SYSTEMS)].filter(Boolean).join(' · ') || text;
}

export const count = (n) => Number(n ?? 0).toLocaleString();

export const inWaiting = (ms) => `Connection lost; trying again in ${Math.ceil(ms / 1000)} s.`;

// offerSignOut shows the button to who is signed in, and gives what else the
// server says of itself.
export async function offerSignOut() {
  const server = await getJSON('/').catch(() => ({}));
  $.signout.hidden = !server.signedIn;
  $.signout.onclick = async () => {
    await request('/signout', { method: 'POST' }).catch(() => {});
    location.assign('/');
  };
  return server;
}

// remove deletes what somebody says yes to, and gives the server's answer.
export async function remove(path, question, note) {
  try {
    return confirm(`${question} This cannot be undone.`) && await request(path, { method: 'DELETE' });
  } catch (err) {
    return note(`Deleting failed: ${err.message}`);
  }
}

// copied puts text on the clipboard. Without a secure origin a browser has no
// clipboard for pages: then the text is shown, to be copied by hand.
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    prompt('Copy this:', text);
    return false;
  }
}
