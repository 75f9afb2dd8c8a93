// Recording over networks that refuse WebSockets or are slow, and visits that end:
// in real Chromium, with a proxy between the pages and the real server.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { connect, createServer } from "node:net";
import { sleep, until } from "./harness.mjs";
import { arrived, browser, close, customs, embed, established, h, mark, movable, open, pages, playable, sessionOf, site, visit } from "./recorded.mjs";

// A proxy for TCP. What passes takes delay ms each way, a connection's first
// message a round trip more. Requests for WebSockets get what refusal says, POSTs
// wait until hold has come; posts has what the server said to each. Muted, nothing
// that the server says reaches a page.
const proxy = { delay: 0, refusal: "", hold: null, isMuted: false, posts: [] };
const through = createServer((page) => { // a chunk begins where a request does: no browser sends two at once
  const server = connect(Number(new URL(h.url).port), "127.0.0.1");
  let post = null, before = Promise.resolve(sleep(2 * proxy.delay));
  const pass = (chunk, to) => setTimeout(() => to.writable && (chunk ? to.write(chunk) : to.end()), proxy.delay);
  page.on("data", (chunk) => {
    const text = chunk.toString("latin1");
    if (text.startsWith("POST /ws")) proxy.posts.push(post = { answer: "" });
    if (proxy.refusal && /^upgrade: websocket/im.test(text)) return page.end(`HTTP/1.1 ${proxy.refusal}\r\nContent-Length: 0\r\n\r\n`);
    const hold = text.startsWith("POST /ws") && proxy.hold;
    return before = before.then(() => hold).then(() => pass(chunk, server));
  });
  server.on("data", (chunk) => {
    if (post) post.answer += chunk;
    if (!proxy.isMuted) pass(chunk, page);
  });
  page.on("end", () => before.then(() => pass(null, server)));
  server.on("end", () => pass(null, page));
  for (const [from, to] of [[page, server], [server, page]]) from.on("error", () => to.destroy());
});

before(async () => {
  await open();
  await new Promise((done) => through.listen(0, "127.0.0.1", done));
  proxy.url = `http://127.0.0.1:${through.address().port}`;
});
after(() => { through.close(); return close(); });

// distant puts a page on the site whose tracker reaches the server by the proxy.
const distant = (path, body, more = "") => embed(path, body, `data-endpoint="${proxy.url}" ${more}`, "/tracker.js");

function using(t, settings) {
  Object.assign(proxy, { posts: [], ...settings });
  t.after(() => Object.assign(proxy, { delay: 0, refusal: "", hold: null, isMuted: false }));
}

const transport = (page) => page.evaluate(() => window.sessionReplay.state.transport);

// watching joins a session as a viewer does, and gives what has come live so far.
async function watching(t, id) {
  const page = await visit(t, `${h.url}/demo`);
  await page.evaluate(([address, id]) => new Promise((joined) => {
    const socket = new WebSocket(address), seen = window.seen = { events: [] };
    socket.onopen = () => socket.send(JSON.stringify({ type: "viewer_join_session", data: { sessionId: id } }));
    socket.onmessage = ({ data: text }) => {
      const { type, data } = JSON.parse(text);
      if (type === "session_joined") joined();
      if (type === "events_batch") seen.events.push(...data.events);
    };
  }), [`${h.url.replace("http", "ws")}/ws?type=viewer`, id]);
  return () => page.evaluate(() => window.seen);
}

test("where WebSockets are refused the demo is recorded whole, by POST, and seen live", async (t) => {
  using(t, { refusal: "403 Forbidden" });
  const page = await visit(t, `${proxy.url}/demo`, { script: movable });
  const id = await established(page);
  assert.equal(await transport(page), "post");
  const live = await watching(t, id);
  await page.click("text=Add >> nth=0");
  await mark(page, 30);
  await until(async () => customs((await live()).events, "mark").includes(page.marks - 1), "the marks, live");
  const seen = await live();
  assert.ok(seen.events.some(isClick), "the click is seen live");
  await page.evaluate(() => { setTimeout(() => { throw new Error("of the page"); }); });
  await page.reload();
  await mark(page, 60);
  await page.click("text=Go to checkout");
  await page.fill("[name=street]", "Somewhere");
  await mark(page, 10);
  assert.equal(await sessionOf(page), id);
  const events = await arrived(page, id);
  assert.match(await playable(events), /Checkout/);
  assert.equal((await h.json(`/sessions/${id}/errors`)).errors.length, 1);

  const upgrades = page.waitForEvent("websocket");
  proxy.refusal = "";
  await page.evaluate(() => window.move(4 * 60_000));
  await mark(page, 1);
  await upgrades;
  await until(async () => await transport(page) === "websocket", "a WebSocket, tried again");
  await mark(page, 5);
  await arrived(page, id);
  await page.evaluate(() => window.sessionReplay.stop());
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the end");
  assert.deepEqual(page.wrong, ["of the page"]);
});

test("a refusal by POST has a reason; stop() sends what waits", async (t) => {
  using(t, { refusal: "403 Forbidden" });
  await h.restart({ SESSION_GRACE_PERIOD: "600000" });
  const page = await visit(t, distant("/stopped", "<p>stopped"));
  const id = await established(page);
  await page.evaluate(() => { window.sessionReplay.event("mark", 1); window.sessionReplay.stop(); });
  page.marks = 2;
  await arrived(page, id);
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the end of the session");
  using(t, { isMuted: true });
  const early = await visit(t, distant("/early", "<p>stopped early"));
  const unanswered = await sessionOf(early);
  await mark(early, 1);
  await early.evaluate(() => window.sessionReplay.stop());
  await arrived(early, unanswered);
  await until(async () => !(await h.json(`/sessions/${unanswered}`)).isActive, "the end of the other session");
  using(t, { isMuted: false, refusal: "403 Forbidden" });
  await h.restart({ INGEST_KEY: "write-only", SESSION_GRACE_PERIOD: "" });
  t.after(() => h.restart({ INGEST_KEY: "" }));
  const refused = await visit(t, distant("/refused", "<p>refused"));
  await until(() => refused.evaluate(() => window.sessionReplay.state.reason === "refused: key"), "the reason");
});

// parting is a script for a page's start: when the page is left it records marks
// that have no ack, behind a closed socket (as Firefox has it) if that is asked for.
const parting = ({ closes = false, room = Infinity }) => `
  const Theirs = window.WebSocket, { setItem } = Storage.prototype;
  let socket;
  window.WebSocket = class extends Theirs { constructor(...args) { super(...args); socket = this; } };
  Storage.prototype.setItem = function (name, value) {
    if (value.length > ${room}) throw new Error("full");
    return setItem.call(this, name, value);
  };
  window.addEventListener("pagehide", () => {
    if (${closes} && socket) socket.close();
    for (const i of window.last ?? []) window.sessionReplay.event("mark", i);
    window.sessionReplay.event("filler", "x".repeat(30_000));
  }, { capture: true });`;

// last sets marks that the page is to record when it is left.
async function last(page, n) {
  await page.evaluate((marks) => { window.last = marks; }, Array.from({ length: n }, (_, i) => page.marks + i));
  page.marks += n;
}

for (const [name, options] of [["and the next page sends it again", {}], ["alone", { closes: true, room: 20_000 }]]) {
  test(`a page's last POST, ${name}, before and after the next page has connected`, async (t) => {
    using(t, {});
    const page = await visit(t, null, { script: parting(options) });
    await page.goto(distant("/parting", "<p>parting"));
    const id = await established(page);
    await last(page, 3);
    await page.reload();
    await mark(page, 2);
    await arrived(page, id);

    let release;
    using(t, { hold: new Promise((done) => { release = done; }) });
    await last(page, 3);
    const since = Date.now();
    await page.reload();
    if (options.closes) await until(() => page.evaluate(() => window.sessionReplay.sessionId), "the next page's session");
    else await until(async () => await transport(page) === "websocket", "the next page's connection");
    await mark(page, 2);
    if (!options.closes) await arrived(page, id);
    await until(() => proxy.posts.length, "the POST");
    release();
    const isSoon = Date.now() - since < 3000; // the next page waits for 3.75 s at least, then it says that something is missing
    if (options.closes && !isSoon) return t.skip("the POST was released too late to tell");
    await until(() => proxy.posts.every(({ answer }) => /events_ack|"taken"/.test(answer)), "its answer"); // or its session has gone on
    await mark(page, 2);
    const events = await arrived(page, id);
    assert.ok(proxy.posts[0].answer.includes("later_page") || options.closes, proxy.posts[0].answer);
    assert.equal(customs(events, "gap").length, 0);
    assert.equal(customs(events, "filler").length, 2);
    assert.equal(await sessionOf(page), id);
    assert.equal(await transport(page), "websocket");
    await playable(events);
  });
}

test("a last POST that never comes is a gap", async (t) => {
  using(t, {});
  const page = await visit(t, null, { script: parting({ closes: true, room: 20_000 }) });
  await page.goto(distant("/nevercame", "<p>never came"));
  const id = await established(page);
  using(t, { hold: new Promise(() => {}) });
  await page.reload();
  await mark(page, 2);
  const events = await arrived(page, id);
  assert.ok(customs(events, "gap").length > 0);
  await playable(events);
});

test("what happened just before a link to another origin, behind a closed socket, arrives", async (t) => {
  using(t, {});
  const page = await visit(t, null, { script: parting({ closes: true }) });
  await page.goto(distant("/away", "<p>away"));
  const id = await established(page);
  using(t, { isMuted: true }); // no acks: with what follows it is more than a last POST may have
  await page.evaluate(() => window.sessionReplay.event("filler", "x".repeat(50_000)));
  await until(async () => customs(await h.events(id), "filler").length, "what the socket was given");
  await last(page, 3);
  await page.goto(`${h.url}/demo`);
  await arrived(page, id);
});

// visits opens a page n times, clicks, and ends each visit as end says. It gives
// their users, and in ended those whose page could still run a script at its end:
// a browser that is busy does not wait for a page that it closes.
async function visits(t, name, n, body, end) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const users = Array.from({ length: n }, (_, i) => `${name}-${i}`), ended = new Set();
  const tell = "<script>addEventListener('pagehide', () => navigator.sendBeacon('/ended', location.pathname.slice(1)));</script>";
  pages["/ended"] = (request, response) => {
    request.on("data", (user) => ended.add(String(user)));
    request.on("end", () => response.end());
  };
  const one = async (user) => {
    const page = await context.newPage();
    await page.goto(distant(`/${user}`, tell + body, `data-user="${user}"`));
    await page.evaluate(() => document.getElementById("b").click());
    await end(page);
    await page.close();
  };
  await Promise.all([0, 1, 2, 3].map(async (lane) => {
    for (const user of users.filter((_, i) => i % 4 === lane)) await one(user);
  }));
  while (ended.size < 2 && users.length < 100) { // one after the other
    const user = `${name}-${users.length}`;
    users.push(user);
    await one(user);
  }
  return { users, ended };
}

const isClick = (e) => e.data.source === 2 && e.data.type === 2;

// whole gives how many visits have their snapshot and clicks. It waits for those that
// could end: for half of them without end, for the rest a while only, because a busy
// browser may end a page before the page's last request has left it.
async function whole({ users, ended }, clicks = 1) {
  const found = new Set(), late = Date.now() + 5000;
  await until(async () => {
    for (const user of users.filter((one) => !found.has(one))) {
      const { sessions: [session] } = await h.json(`/sessions?userId=${user}`);
      const events = session ? await h.events(session.sessionId) : [];
      if (events.some((e) => e.type === 2) && events.filter(isClick).length >= clicks) found.add(user);
    }
    const lost = [...ended].filter((user) => !found.has(user)).length;
    return ended.size && (!lost || Date.now() > late && lost <= ended.size / 2);
  }, "half of the visits");
  return found.size;
}

test("visits that end at once have their snapshot and their click", async (t) => {
  using(t, { delay: 75 });
  const page = (size) => `<button id=b>press</button><p>${"many words ".repeat(size / 11)}`;
  const large = await visits(t, "large", 4, page(70_000), () => {});
  for (const after of [0, 100, 250]) {
    const all = await visits(t, `after${after}`, 8, page(20_000), () => sleep(after));
    const count = await whole(all);
    t.diagnostic(`closed ${after} ms after load, at a round trip of 150 ms: ${count} of ${all.users.length} have snapshot and click,`
      + ` ${all.ended.size} ran to their end`);
  }
  await whole(await visits(t, "small", 4, page(50_000), () => {}));
  const found = await Promise.all(large.users.map((user) => h.json(`/sessions?userId=${user}`)));
  t.diagnostic(`closed at once with a snapshot of 70 KB: ${found.filter(({ sessions }) => sessions.length).length} of ${large.users.length}`);
});

test("a first snapshot of 300 KB leaves compressed with a page that has no connection yet", async (t) => {
  using(t, { isMuted: true });
  const words = Array.from({ length: 15_000 }, (_, i) => (i * 7919 % 9973).toString(36)).join(" ");
  const spy = `<script>const { blob } = Response.prototype;
    Response.prototype.blob = async function () { const all = await blob.call(this); window.packed = all.size; return all; };</script>`;
  const all = await visits(t, "packed", 4, `${spy}<button id=b>press</button><p>${words}${" and so on".repeat(25_000)}`, async (page) => {
    for (let i = 0; i < 3; i++) { // one may be packed while the next click comes
      await page.evaluate(() => { window.packed = 0; document.getElementById("b").click(); });
      await until(() => page.evaluate(() => window.packed), "what is packed");
    }
    t.diagnostic(`${await page.evaluate(() => window.packed)} bytes`);
  });
  t.diagnostic(`${await whole(all, 3)} of ${all.users.length} have snapshot and clicks, ${all.ended.size} ran to their end`);
});

test("visits that end later have everything", async (t) => {
  using(t, { delay: 75 });
  const ends = [["closed", () => {}], ["left", (page) => page.goto(`${h.url}/demo`)], ["reloaded", (page) => page.reload()]];
  for (const [name, end] of ends) {
    const all = await visits(t, name, 4, "<button id=b>press</button>", async (page) => {
      await until(() => transport(page), "the connection");
      await page.evaluate(() => document.getElementById("b").click());
      await end(page);
    });
    t.diagnostic(`${name} later: ${await whole(all, 2)} of ${all.users.length} have both clicks, ${all.ended.size} ran to their end`);
  }
});
