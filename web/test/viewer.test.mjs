// The viewer's pages in real Chromium, on the real server.
//
//   node --test web/test/viewer.test.mjs
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createServer } from "node:http";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { gzipSync } from "node:zlib";
import { chromium } from "playwright-core";
import { harness, sleep, until } from "./harness.mjs";
import { recording as hostileRecording } from "./hostile.mjs";

let h, browser, site;

before(async () => {
  h = await harness({ SESSION_GRACE_PERIOD: "500" });
  browser = await h.launch();
  site = await h.site({ "/": "<!doctype html>" });
});
after(() => h?.close());

// open gives a page that fails the test if a script in it throws.
async function open(t, path, options = {}) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, ...options });
  const errors = [];
  page.on("pageerror", (err) => errors.push(err.stack || err.message));
  t.after(async () => {
    await page.close();
    assert.deepEqual(errors, [], "errors in the page");
  });
  if (path) await page.goto(h.url + path);
  return page;
}

const text = (page, selector) => page.textContent(selector);
const recorded = (page, selector) => page.evaluate((s) => {
  const frame = document.querySelector(".scene.shown iframe");
  return frame?.contentDocument?.querySelector(s)?.textContent ?? null;
}, selector);
const shows = (page, selector, want, timeout) => until(async () => await recorded(page, selector) === want, `${selector} to show ${want}`, timeout);
const says = (page, selector, pattern, timeout) => until(async () => pattern.test(await text(page, selector)), `${selector} to say ${pattern}`, timeout);
const chunkRequests = (page) => {
  const seen = [];
  page.on("request", (r) => { if (r.url().includes("/chunks/")) seen.push(Number(new URL(r.url()).pathname.split("/").at(-1))); });
  return seen;
};

// A page with one clock in it: its text is the second of the recording.
const clockPage = (second) => ({
  type: 0, id: 1, childNodes: [{ type: 2, id: 2, tagName: "html", attributes: {}, childNodes: [
    { type: 2, id: 3, tagName: "head", attributes: {}, childNodes: [] },
    { type: 2, id: 4, tagName: "body", attributes: {}, childNodes: [
      { type: 2, id: 5, tagName: "p", attributes: { id: "clock" }, childNodes: [{ type: 3, id: 6, textContent: String(second) }] },
      { type: 2, id: 7, tagName: "i", attributes: {}, childNodes: [] }] }] }],
});
const snapshot = (start, second, href = "https://shop.example/") => [
  { type: 4, timestamp: start + second * 1000, data: { href, width: 800, height: 600 } },
  { type: 2, timestamp: start + second * 1000, data: { node: clockPage(second), initialOffset: { left: 0, top: 0 } } },
];
const change = (start, second, more = {}) => ({
  type: 3, timestamp: start + second * 1000,
  data: { source: 0, texts: [{ id: 6, value: String(second) }], attributes: [], removes: [], adds: [], ...more },
});
const mouse = (start, second) => ({
  type: 3, timestamp: start + second * 1000, data: { source: 1, positions: [{ x: second % 700, y: 50, id: 4, timeOffset: 0 }] },
});

// clockChunks makes a recording: a chunk a minute, a full snapshot every `every`
// seconds, `pad` bytes in each event.
function clockChunks(start, minutes, { every = 300, pad = 0 } = {}) {
  return Array.from({ length: minutes }, (_, minute) => Array.from({ length: 60 }, (_, s) => {
    const second = minute * 60 + s;
    const filler = pad ? { attributes: [{ id: 7, attributes: { title: "x".repeat(pad) } }] } : {};
    return second % every === 0 ? snapshot(start, second) : [change(start, second, filler)];
  }).flat());
}

// store writes a session into the database, chunk by chunk, as the server would.
async function store(id, chunks, { metadata = { url: "https://shop.example/cart?item=1" }, user = "ann", errors = [] } = {}) {
  const quote = (s) => `'${String(s).replaceAll("'", "''")}'`;
  const rows = [];
  let index = 0, newest = null;
  const times = (events) => events.map((e) => e?.timestamp).filter(Number.isSafeInteger);
  for (const events of chunks) {
    const full = events.findLastIndex((e) => e?.type === 2);
    if (full >= 0) newest = index + full;
    const json = JSON.stringify(events);
    rows.push(`(${quote(id)}, ${index}, ${events.length}, ${Math.min(...times(events))}, ${Math.max(...times(events))}, ${full >= 0 ? index + full : "null"}, `
      + `${json.length}, decode('${gzipSync(json).toString("base64")}', 'base64'))`);
    index += events.length;
  }
  const all = chunks.flatMap(times);
  await h.sql(`insert into sessions (session_id, user_id, url, metadata, is_active, ended_at, event_count, error_count, first_event_time, last_event_time, snapshot_index)
    values (${quote(id)}, ${quote(user)}, ${quote(metadata.url)}, ${quote(JSON.stringify(metadata))}, false, now(), ${index}, ${errors.length},
      ${all.reduce((a, b) => Math.min(a, b))}, ${all.reduce((a, b) => Math.max(a, b))}, ${newest})`);
  for (let sql = ""; rows.length > 0; sql = "") { // an argument of a command holds 128 KB
    while (rows.length > 0 && (sql === "" || sql.length + rows[0].length < 100_000)) sql += (sql ? "," : "") + rows.shift();
    await h.sql(`insert into session_events (session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events) values ${sql}`);
  }
  for (const [i, data] of errors.entries()) {
    await h.sql(`insert into session_errors (session_id, id, kind, error_data) values (${quote(id)}, ${i}, 'javascript_error', ${quote(JSON.stringify(data))})`);
  }
}

// track starts a live session from a page of its own.
async function track(t, id, data = {}) {
  const page = await browser.newPage();
  t.after(() => page.close());
  await page.goto(site);
  await page.evaluate((host) => new Promise((done) => {
    window.socket = new WebSocket(`ws://${host}/ws?type=tracker`);
    window.say = (type, body) => window.socket.send(JSON.stringify({ type, data: body }));
    window.socket.onopen = done;
  }), h.host);
  const say = (type, body) => page.evaluate(([type, body]) => window.say(type, body), [type, body]);
  const begin = async () => {
    await say("session_start", { sessionId: id, userId: "live user", url: "https://shop.example/live", viewport: { width: 800, height: 600 }, ...data });
    await until(async () => (await h.json("/sessions/active")).sessions.some((s) => s.sessionId === id), "the session to start");
  };
  await begin();
  return { say, begin, send: (events) => say("events_batch", { events }), end: () => say("session_end", { sessionId: id }) };
}

test("an empty list leads to the demo and shows the tag to embed", async (t) => {
  const page = await open(t, "/");
  await says(page, "#tag", new RegExp(`<script src="${h.url}/tracker.js" async></script>`));
  assert.equal(await page.getAttribute("#empty a", "href"), "/demo");
  assert.ok(await page.isVisible("#empty"));
});

test("live sessions appear first and by themselves, and become recorded ones", async (t) => {
  const page = await open(t, "/");
  await page.waitForSelector("#empty:visible");
  const tracker = await track(t, "comes-and-goes");
  await page.waitForSelector('#live a[href="/view/comes-and-goes"]', { timeout: 3000 });
  assert.match(await text(page, "#live tr"), /live user.*shop\.example\/live/);
  await tracker.send(snapshot(Date.now(), 0));
  await says(page, "#live td:nth-child(5)", /^2$/, 8000);
  assert.deepEqual((await h.json("/sessions?active=false")).sessions, []);
  await tracker.end();
  await page.waitForSelector('#past a[href="/view/comes-and-goes"]', { timeout: 3000 });
  assert.equal(await page.locator("#live tr").count(), 0);
});

test("a narrow list does not scroll sideways", async (t) => {
  await track(t, "narrow-live");
  await store("narrow-past", [snapshot(Date.now(), 0)]);
  const page = await open(t, "/", { viewport: { width: 390, height: 800 } });
  await page.waitForSelector("#live a");
  await page.waitForSelector("#past a");
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 390);
});

test("10,000 sessions are listed in pages", async (t) => {
  await h.sql(`insert into sessions (session_id, user_id, url, metadata, is_active, created_at, ended_at, event_count, first_event_time, last_event_time)
    select 'many-' || n, 'user ' || n, 'https://shop.example/' || n, json_build_object('url', 'https://shop.example/' || n), false,
      now() - n * interval '1 minute', now(), n, 1000, 1000 + n from generate_series(1, 10000) n`);
  const page = await open(t);
  const began = Date.now();
  await page.goto(`${h.url}/`);
  await page.waitForSelector('#past a[href="/view/many-1"]');
  assert.ok(Date.now() - began < 2000, `the list took ${Date.now() - began} ms`);
  assert.equal(await page.locator("#past tr").count(), 50);
  assert.ok(await page.isDisabled("#newer"));
  const first = await text(page, "#past tr:first-child");
  await page.click("#older");
  await says(page, "#range", /^51 – 100$/);
  await until(async () => await text(page, "#past tr:first-child") !== first, "the next page");
  assert.equal(new URL(page.url()).search, "?offset=50");
  await page.goto(`${h.url}/?offset=10000`);
  await says(page, "#range", /^10,001 – /);
  assert.ok(await page.isDisabled("#older"));
  await page.click("#newer");
  await says(page, "#range", /^9,951 – 10,000$/);
  await h.sql("delete from sessions where session_id like 'many-%'");
});

test("a hostile recording runs nothing and requests nothing", async (t) => {
  const requests = [];
  let connections = 0;
  const evil = createServer((request, response) => { requests.push(request.url); response.end("evil"); });
  evil.on("connection", () => connections++);
  await new Promise((done) => evil.listen(0, "127.0.0.1", done));
  t.after(() => { evil.closeAllConnections(); evil.close(); });
  const address = `http://127.0.0.1:${evil.address().port}`;
  const attack = "<img src=x onerror=\"top.pwned='text'\">";
  await store("hostile", [hostileRecording(address)], {
    metadata: { url: `javascript:top.pwned='url'//${attack}`, userAgent: attack, [attack]: attack, referrer: { toString: 1 }, viewport: { width: { toString: 1 } } }, user: attack,
    errors: [{ message: attack, stack: { toString: 1 } }, null, { message: { toString: 1 }, timestamp: 1e300 }],
  });

  // A profile of its own on disk, because a private window never connects in
  // advance; and Chromium's log of the network, which tells what no server
  // would: names looked up.
  const dir = mkdtempSync(join(tmpdir(), "session-replay-hostile-"));
  const log = join(dir, "netlog.json");
  const own = await chromium.launchPersistentContext(join(dir, "profile"), {
    executablePath: execFileSync("sh", ["-c", "command -v chromium"], { encoding: "utf8" }).trim(),
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync", `--log-net-log=${log}`],
  });
  t.after(async () => {
    await own.close();
    rmSync(dir, { recursive: true, force: true });
  });
  const page = await own.newPage();
  const allowed = /^\/(view\/hostile|assets\/(view|api|events|picture|player|recording|scene|styles|timeline|rrweb-replay)\.js|assets\/(style|rrweb-replay)\.css|sessions\/hostile(\/errors|\/chunks\/0)?|)$/;
  const strange = [];
  page.on("response", (r) => {
    const { origin, pathname, search } = new URL(r.url());
    if (origin !== h.url || !allowed.test(pathname) || search.replace(/^\?of=\d+$/, "")) strange.push(r.url());
  });
  const ended = async () => {
    await page.waitForFunction(() => window.player?.state === "ended");
    await shows(page, "#alive", "still alive");
    await sleep(300);
    assert.deepEqual(await page.evaluate(() => [window.pwned, frames.length, document.activeElement.tagName]), [undefined, 1, "BODY"]);
    const sandboxes = await page.evaluate(() => [...document.querySelectorAll("iframe")].map((f) => f.getAttribute("sandbox")));
    assert.deepEqual(sandboxes, ["allow-same-origin"]);
    assert.equal(await page.locator("main img, main script, header img").count(), 0);
    assert.ok(page.url().startsWith(`${h.url}/view/hostile`), page.url());
  };
  await page.goto(`${h.url}/view/hostile`);
  await ended();
  await page.keyboard.press(" "); // once more from the start, then by seeking through it
  await page.waitForFunction(() => window.player.state === "playing");
  await ended();
  for (const key of ["ArrowLeft", "ArrowRight", "ArrowLeft"]) await page.keyboard.press(key);
  for (let i = 0; i < 15; i++) { // the keyboard never gets into the recording, where Enter would follow links
    await page.keyboard.press("Tab");
    assert.notEqual(await page.evaluate(() => document.activeElement.tagName), "IFRAME");
  }
  await page.goto(`${h.url}/?offset=0`);
  await page.waitForSelector('a[href="/view/hostile"]');
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  await own.close();

  assert.deepEqual(requests, []);
  assert.equal(connections, 0, "connections to the attacker's server");
  assert.deepEqual(strange.filter((url) => !/\/(\?offset=0|sessions(\/active|\?.*)|assets\/list\.js)$/.test(url.slice(h.url.length))), []);
  assert.deepEqual(readFileSync(log, "utf8").match(/[\w-]+\.evil\.test/g), null, "names looked up");
});

test("live replay shows what the recorded page shows", async (t) => {
  const demo = await browser.newPage({ viewport: { width: 1000, height: 700 } });
  t.after(() => demo.close());
  await demo.goto(`${h.url}/demo`);
  await demo.waitForFunction(() => window.sessionReplay?.sessionId);
  const id = await demo.evaluate(() => window.sessionReplay.sessionId);
  await until(async () => (await h.json(`/sessions/${id}`).catch(() => ({}))).snapshotIndex != null, "a full snapshot");
  const page = await open(t);
  const began = Date.now();
  await page.goto(`${h.url}/view/${id}`);
  await page.waitForFunction(() => window.player?.state === "playing" && window.player.following);
  t.diagnostic(`live ${Date.now() - began} ms after opening`);
  assert.ok(Date.now() - began < 3000); // a second, on a machine with time to spare
  assert.equal(await text(page, "#badge"), "Live");
  await demo.click('[aria-label="Add Pears, a bag"]');
  await demo.click('[aria-label="Add Sourdough bread"]');
  await demo.check("#account [name=news]");
  await demo.mouse.wheel(0, 200);
  await demo.click("#throw");
  // What is seen, without what recording changes: scripts, masks, the mouse.
  const seen = (root) => {
    const gone = ["SCRIPT", "NOSCRIPT", "STYLE", "LINK", "META", "TITLE", "HEAD"];
    const walk = (node) => {
      if (node.nodeType === 3) return node.textContent.trim() ? [node.textContent.trim()] : [];
      if (node.nodeType !== 1 || gone.includes(node.tagName)) return [];
      const state = node.tagName === "INPUT" && /checkbox|radio/.test(node.type) ? ` ${node.checked}` : "";
      return [`${node.tagName} ${node.id} ${node.hidden}${state}`, ...[...node.childNodes].flatMap(walk)];
    };
    return { nodes: walk(root.body), scroll: root.defaultView.scrollY };
  };
  const original = await demo.evaluate(`(${seen})(document)`);
  assert.ok(original.nodes.length > 50 && original.scroll > 0);
  let replayed;
  await until(async () => {
    replayed = await page.evaluate(`(${seen})(document.querySelector(".scene.shown iframe").contentDocument)`);
    return JSON.stringify(replayed) === JSON.stringify(original);
  }, "the replay to look like the page", 5000).catch(() => assert.deepEqual(replayed, original));
  await says(page, "#errors", /shelf fell down/, 3000);

  await demo.goto(`${h.url}/demo/checkout`); // the same session goes on
  await until(async () => (await recorded(page, "#pay")) !== null, "the next page");
  await page.waitForSelector("#marks .navigation", { state: "attached" });
});

test("a deep link and seeking load only what they need", async (t) => {
  const start = Date.now() - 5 * 3600_000;
  await store("four-hours", clockChunks(start, 240, { pad: 400 }));
  const page = await open(t);
  const chunks = chunkRequests(page);
  await page.goto(`${h.url}/view/four-hours?t=10830`); // 3:00:30
  await page.keyboard.press(" ");
  await until(async () => Number(await recorded(page, "#clock")) >= 10830, "3:00:30");
  assert.match(await text(page, "#now"), /^3:00:3[0-2]$/);
  assert.equal(await text(page, "#length"), "3:59:59");
  await sleep(500);
  const first = 180 * 60 + 180 / 5; // index of minute 180: a snapshot is two events
  const minutes = (from) => chunks.map((c) => Math.floor((c - from) / 60));
  assert.ok(chunks.length <= 3 && Math.min(...minutes(first)) === 0, `loaded minutes ${minutes(first)} from 3:00:00 on`);

  chunks.length = 0;
  await page.evaluate(() => {
    const seek = document.getElementById("seek");
    seek.value = 3600_000 + 299_000; // 1:04:59, the end of what hangs on one snapshot
    seek.dispatchEvent(new Event("input"));
    seek.dispatchEvent(new Event("change"));
  });
  await shows(page, "#clock", "3899");
  await sleep(500);
  assert.equal(new URL(page.url()).search, "?t=3899");
  const second = 60 * 60 + 60 / 5;
  assert.ok(chunks.length <= 7 && Math.min(...minutes(second)) === 0, `loaded minutes ${minutes(second)} from 1:00:00 on`);
});

test("what cannot be loaded leaves what is shown, to go on with", async (t) => {
  await store("partly-away", clockChunks(Date.now() - 3600_000, 8));
  const page = await open(t);
  let away = true;
  await page.route(/\/chunks\/362\b/, (route) => (away ? route.fulfill({ status: 404 }) : route.continue())); // the seventh minute
  const scanned = page.waitForResponse(/\/chunks\/362\b/); // for its marks
  await page.goto(`${h.url}/view/partly-away`);
  await page.waitForFunction(() => window.player?.state === "playing");
  await scanned;
  await sleep(100);
  assert.equal(await text(page, "#note"), "");
  const seek = () => page.evaluate(() => {
    const slider = document.getElementById("seek");
    slider.value = 400_000; // its snapshot is in the minute before
    slider.dispatchEvent(new Event("change"));
  });
  await seek();
  await says(page, "#note", /There is no such session/);
  await seek();
  await page.waitForFunction(() => window.player.state === "paused");
  assert.equal(await text(page, "#play"), "Play");
  assert.equal(await page.locator("#stage .scene").count(), 1);
  const before = Number(await recorded(page, "#clock"));
  await page.click("#play");
  await shows(page, "#clock", String(before + 2), 4000);
  away = false;
  await seek();
  await shows(page, "#clock", "400");
  assert.equal(await page.locator("#stage .scene").count(), 1);
});

test("playing a large session holds a window of it", async (t) => {
  // 40 MB in 40 s, with one full snapshot only, at its beginning.
  const start = Date.now() - 3600_000;
  const chunks = Array.from({ length: 40 }, (_, s) => [
    ...(s === 0 ? snapshot(start, 0) : []), mouse(start, s),
    change(start, s + 0.5, { attributes: [{ id: 7, attributes: { title: `${s}`.padEnd(1_000_000, "x") } }] }),
  ]);
  await store("large", chunks);
  const page = await open(t, "/view/large");
  await page.route("**/chunks/*", async (route) => { // too slow for the speed: it runs out again and again
    await sleep(100);
    await route.continue();
  });
  await page.waitForFunction(() => window.player?.state === "playing");
  await page.selectOption("#speed", "16");
  let most = 0, waits = 0;
  await until(async () => {
    const [state, bytes] = await page.evaluate(() => [window.player.state, window.player.scene.pieces.reduce((sum, p) => sum + p.bytes, 0)]);
    most = Math.max(most, bytes);
    if (state === "loading") waits++;
    return state === "ended";
  }, "the end", 60_000);
  t.diagnostic(`at most ${Math.round(most / 1e6)} MB of 40 MB were held`);
  assert.ok(waits > 0, "it never ran out");
  assert.ok(most > 8e6 && most < 36e6);
  assert.equal(await recorded(page, "#clock"), "39.5");
  await page.keyboard.press("ArrowLeft"); // behind the window's only way back: from the snapshot, in steps
  await shows(page, "#clock", "34.5");
});

test("keys and buttons", async (t) => {
  const start = Date.now() - 600_000;
  await store("keys", clockChunks(start, 2), { errors: [{ message: "it broke", timestamp: start + 90_000 }] });
  const page = await open(t, "/view/keys");
  const playing = (want) => until(async () => (await page.evaluate(() => window.player.state === "playing")) === want, `playing ${want}`);
  await page.waitForFunction(() => window.player?.scene);
  await playing(true);
  await page.keyboard.press(" ");
  await playing(false);
  assert.equal(await text(page, "#play"), "Play");
  const now = () => page.evaluate(() => Math.round((window.player.time - window.player.recording.start) / 1000));
  const at = await now();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await shows(page, "#clock", String(at + 10));
  await page.keyboard.press("ArrowLeft");
  await shows(page, "#clock", String(at + 5));
  assert.equal(new URL(page.url()).search, `?t=${at + 5}`);
  await page.keyboard.press("f");
  await page.waitForFunction(() => document.fullscreenElement?.id === "player");
  await page.keyboard.press("f");
  await page.waitForFunction(() => !document.fullscreenElement);

  await page.focus("#seek"); // a slider that a keyboard and a screen reader can use
  await page.keyboard.press("End");
  await shows(page, "#clock", "119");
  assert.equal(await page.getAttribute("#seek", "aria-valuetext"), "1:59 of 1:59");
  await page.keyboard.press("Home");
  await shows(page, "#clock", "0");

  assert.equal(await page.locator("#marks .error").count(), 1);
  await page.click("#errors button");
  await shows(page, "#clock", "89");
  assert.equal(new URL(page.url()).search, "?t=89");

  await page.click("#play");
  await playing(true);
  await page.selectOption("#speed", "8");
  await until(async () => (await now()) > 96, "eight times the speed", 2000);

  page.once("dialog", (d) => d.dismiss());
  await page.click("#delete");
  assert.equal((await h.json("/sessions/keys")).sessionId, "keys");
  page.once("dialog", (d) => d.accept());
  await page.click("#delete");
  await page.waitForURL(`${h.url}/`);
  await assert.rejects(h.json("/sessions/keys"), /404/);
});

test("inactivity is skipped, gaps are told", async (t) => {
  const start = Date.now() - 600_000;
  await store("idle", [[...snapshot(start, 0), mouse(start, 1), change(start, 2)], [change(start, 60)], [
    mouse(start, 100), change(start, 101),
    { type: 5, timestamp: start + 102_000, data: { tag: "gap", payload: { from: start + 101_000, to: start + 113_000 } } },
    ...snapshot(start, 103, "https://shop.example/other"), mouse(start, 104), change(start, 105),
  ]]);
  const page = await open(t, "/view/idle");
  await page.check("#skip");
  await shows(page, "#clock", "101", 6000);
  await says(page, "#note", /Skipped 1:\d\d without activity/);
  await says(page, "#note", /The recording has a gap here of 0:12/, 4000);
  await page.waitForSelector("#marks .gap", { state: "attached" });
  await page.waitForSelector("#marks .navigation", { state: "attached" });
});

test("a live session: back in time, back to live, and then it is history", async (t) => {
  const start = Date.now() - 30_000;
  const tracker = await track(t, "lives");
  await tracker.send([...snapshot(start, 0), ...Array.from({ length: 29 }, (_, i) => change(start, i + 1))]);
  const page = await open(t, "/view/lives");
  await shows(page, "#clock", "29");
  await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("ArrowLeft");
  await until(async () => Number(await recorded(page, "#clock")) < 24, "the past");
  assert.equal(await page.getAttribute("#live", "aria-pressed"), "false");
  await tracker.send([change(start, 30)]);
  await page.click("#live");
  await shows(page, "#clock", "30", 3000);
  assert.equal(await page.getAttribute("#live", "aria-pressed"), "true");
  assert.equal(new URL(page.url()).search, "");

  await tracker.say("javascript_error", { message: "broke just now", timestamp: start + 30_000 });
  await says(page, "#errors", /broke just now/);
  await page.route("**/sessions/lives", async (route) => { // a slow answer: meanwhile it plays on
    await sleep(1500);
    await route.continue();
  });
  await tracker.end();
  await says(page, "#badge", /Recorded/);
  await says(page, "#note", /has ended/);
  assert.ok(await page.isHidden("#live"));
  await page.waitForFunction(() => window.player.state === "ended");
  await page.click("#play");
  await shows(page, "#clock", "1", 4000);
});

test("a session that comes back after its end is followed again", async (t) => {
  const start = Date.now();
  let tracker = await track(t, "comes-back");
  await tracker.send(snapshot(start, 0));
  const page = await open(t, "/view/comes-back");
  await shows(page, "#clock", "0");
  const follows = async (second) => {
    await tracker.send([change(start, second)]);
    await shows(page, "#clock", String(second), 4000);
    assert.deepEqual([await text(page, "#badge"), await page.getAttribute("#live", "aria-pressed"), await text(page, "#note")], ["Live", "true", ""]);
  };
  await h.restart();
  await says(page, "#note", /has ended/);
  await page.waitForFunction(() => window.player.state === "ended");
  tracker = await track(t, "comes-back");
  await follows(1);

  let answer; // what is asked at the end is answered when the session is back
  const late = new Promise((done) => { answer = done; });
  await page.route("**/sessions/comes-back", async (route) => {
    const response = await route.fetch(), json = { ...await response.json(), isActive: false };
    await late;
    await route.fulfill({ response, json });
  });
  await tracker.end();
  await says(page, "#note", /has ended/);
  await tracker.begin();
  await says(page, "#badge", /Live/);
  const answered = page.waitForResponse("**/sessions/comes-back");
  answer();
  await (await answered).finished();
  await follows(2);

  await tracker.end();
  await says(page, "#note", /has ended/);
  await page.keyboard.press("ArrowLeft"); // who looks at the past is left there
  await tracker.begin();
  await says(page, "#badge", /Live/);
  assert.equal(await page.getAttribute("#live", "aria-pressed"), "false");
});

test("a live session without a snapshot waits for it, in words", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "late-snapshot");
  await tracker.send([change(start, 0)]);
  const page = await open(t, "/view/late-snapshot");
  await says(page, "#message", /Waiting for the page’s next snapshot/);
  await tracker.send(snapshot(start, 1));
  await shows(page, "#clock", "1");
  assert.equal(await text(page, "#message"), "");
});

test("a first snapshot that came while the connection was lost is shown", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "missed-snapshot");
  await tracker.send([change(start, 0)]);
  const page = await open(t);
  const wires = [];
  let there;
  const stored = new Promise((done) => { there = done; });
  await page.routeWebSocket(/\/ws/, async (ws) => {
    if (wires.push(ws) > 1) await stored;
    ws.connectToServer();
  });
  await page.goto(`${h.url}/view/missed-snapshot`);
  await says(page, "#message", /Waiting/);
  await wires[0].close({ code: 4999 });
  await tracker.send(snapshot(start, 1));
  await until(async () => (await h.json("/sessions/missed-snapshot")).snapshotIndex === 2, "the snapshot");
  there();
  await shows(page, "#clock", "1", 4000);
  await tracker.send([change(start, 2)]);
  await shows(page, "#clock", "2", 4000);
});

test("a session without any event says so; its first one is shown, whatever time was asked for", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "nothing");
  const page = await open(t, "/view/nothing?t=0");
  await says(page, "#message", /Waiting/, 3000);
  await tracker.end();
  await says(page, "#message", /Nothing was recorded/, 3000);
  await page.reload();
  await says(page, "#message", /Nothing was recorded/, 3000);
  await tracker.begin();
  await page.reload();
  await says(page, "#message", /Waiting/, 3000);
  await tracker.send([...snapshot(start, 0), change(start, 1)]);
  await shows(page, "#clock", "1", 4000);
  assert.equal(await text(page, "#message"), "");
});

test("live replay goes on when the recorded computer’s clock is set back", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "clock-back");
  await tracker.send([...snapshot(start, 120), change(start, 125)]);
  const page = await open(t, "/view/clock-back");
  await shows(page, "#clock", "125");
  for (let i = 1; i <= 25; i++) { // more batches than their lags are remembered
    await tracker.send([change(start, i / 10)]);
    await sleep(60);
  }
  await shows(page, "#clock", "2.5", 3000);
});

test("a live session that could not be deleted is shown further", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "undeleted");
  await tracker.send(snapshot(start, 0));
  const page = await open(t, "/view/undeleted");
  await shows(page, "#clock", "0");
  await page.route("**/sessions/undeleted", (route) => (route.request().method() === "DELETE" ? route.fulfill({ status: 503 }) : route.continue()));
  page.once("dialog", (d) => d.accept());
  await page.click("#delete");
  await says(page, "#note", /It was not deleted/);
  await tracker.send([change(start, 1)]);
  await shows(page, "#clock", "1", 4000);
});

test("a lost connection is told, and mended", async (t) => {
  const tracker = await track(t, "cut-off");
  const start = Date.now();
  await tracker.send(snapshot(start, 0));
  const page = await open(t, "/view/cut-off");
  const list = await open(t, "/");
  await shows(page, "#clock", "0");
  await list.waitForSelector("#live a");
  await h.kill();
  await says(page, "#note", /Connection lost; trying again in \d+ s/);
  await says(list, "#note", /Connection lost; trying again in \d+ s/);
  await h.start();
  await says(page, "#note", /Connected again|has ended/, 20_000);
  await says(list, "#note", /^$/, 20_000);
});

test("a session that is not there, one without a picture", async (t) => {
  const page = await open(t, "/view/never-was");
  await says(page, "#message", /There is no such session/);
  await store("no-snapshot", [[change(1e12, 0), change(1e12, 1)]]);
  await page.goto(`${h.url}/view/no-snapshot`);
  await says(page, "#message", /no full snapshot/);
});

test("a session that is deleted while it plays is played as far as it is here", async (t) => {
  await store("short-lived", clockChunks(Date.now() - 3600_000, 10));
  const page = await open(t, "/view/short-lived?t=100");
  await page.waitForFunction(() => window.player?.state === "playing" && !window.player.wantsAhead());
  await h.sql("delete from sessions where session_id = 'short-lived'");
  await page.route("**/chunks/*", async (route) => { // answered when all is played
    await page.waitForFunction(() => window.player.state === "loading");
    await route.continue();
  });
  await page.selectOption("#speed", "16");
  await says(page, "#note", /There is no such session/);
  await page.waitForFunction(() => window.player.state === "ended");
  await shows(page, "#clock", "179");
});

test("a session that is recorded anew under the id of a deleted one is not taken for it", async (t) => {
  const first = Date.now() - 3600_000;
  await store("again", [[...snapshot(first, 0), change(first, 7)]]);
  const page = await open(t, "/view/again?t=7"); // its chunk stays in the browser's cache
  await shows(page, "#clock", "7");
  await h.sql("delete from sessions where session_id = 'again'");
  await store("again", [[...snapshot(first, 0), change(first, 8)]]);
  await page.goto(`${h.url}/view/again?t=8`);
  await shows(page, "#clock", "8");
});

test("signing in and out", async (t) => {
  await h.restart({ ACCESS_TOKEN: "correct horse" });
  await store("behind-the-door", [snapshot(Date.now(), 0)]);
  const page = await open(t, "/view/behind-the-door");
  assert.equal(await page.title(), "Sign in");
  await page.fill("#token", "wrong horse");
  await page.keyboard.press("Enter");
  await says(page, "#note", /not the access token/);
  await page.fill("#token", "correct horse");
  await page.click("form button");
  await page.waitForSelector("#stage");
  await shows(page, "#clock", "0"); // at the address that was asked for
  assert.equal(await page.evaluate(() => document.cookie), "", "the cookie is not for scripts");
  await page.click("#signout");
  await page.waitForURL(`${h.url}/`);
  await page.waitForSelector("#token");

  const other = await open(t, "/"); // signed out while a page is open
  await other.fill("#token", "correct horse");
  await other.click("form button");
  await other.waitForSelector("#past a");
  await other.context().clearCookies();
  await other.click("#past a", { timeout: 2000 }).catch(() => {}); // the list may have noticed by itself
  await other.waitForSelector("#token");
});
