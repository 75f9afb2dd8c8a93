// What the tests of the viewer's pages share: pages that may not throw, made-up
// recordings, live sessions. Each test file has a server and a browser of its own.
import assert from "node:assert/strict";
import { after, before } from "node:test";
import { gzipSync } from "node:zlib";
import { harness, until } from "./harness.mjs";

const look = { viewport: { width: 1280, height: 800 } };

// serve starts both before the tests of a file. What it gives has them from then on.
export function serve(env) {
  const t = {};
  before(async () => {
    t.h = await harness(env);
    t.browser = await t.h.launch();
    t.context = await t.browser.newContext(look);
    t.trackers = await t.context.newPage();
    await t.trackers.goto(await t.h.site({ "/": "<!doctype html>" }));
  });
  after(() => t.h?.close());

  // open gives a page that fails the test if a script in it throws: in a context that
  // all tests share, or in one of its own, with options. Made-up recordings have little
  // activity: it is skipped on demand only.
  const open = async (test, path, { skip = false, ...options } = {}) => {
    const isShared = !skip && Object.keys(options).length === 0;
    const page = await (isShared ? t.context.newPage() : t.browser.newPage({ ...look, ...options }));
    const errors = [];
    page.on("pageerror", (err) => errors.push(err.stack || err.message));
    if (!skip) await page.addInitScript(() => { try { localStorage.skip = "false"; } catch { /* no page yet */ } });
    test.after(async () => {
      await page.unrouteAll({ behavior: "ignoreErrors" }); // a handler may be in the middle of an answer
      await page.close();
      assert.deepEqual(errors, [], "errors in the page");
    });
    if (path) await page.goto(t.h.url + path);
    return page;
  };

  // store writes a session into the database, chunk by chunk, as the server would.
  const store = async (id, chunks, { metadata = { url: "https://shop.example/cart?item=1" }, user = "ann", errors = [] } = {}) => {
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
    await t.h.sql(`insert into sessions (session_id, user_id, url, metadata, is_active, ended_at, event_count, error_count, first_event_time, last_event_time, snapshot_index)
      values (${quote(id)}, ${quote(user)}, ${quote(metadata.url)}, ${quote(JSON.stringify(metadata))}, false, now(), ${index}, ${errors.length},
        ${all.reduce((a, b) => Math.min(a, b))}, ${all.reduce((a, b) => Math.max(a, b))}, ${newest})`);
    for (let sql = ""; rows.length > 0; sql = "") { // an argument of a command holds 128 KB
      while (rows.length > 0 && (sql === "" || sql.length + rows[0].length < 100_000)) sql += (sql ? "," : "") + rows.shift();
      await t.h.sql(`insert into session_events (session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events) values ${sql}`);
    }
    for (const [i, data] of errors.entries()) {
      await t.h.sql(`insert into session_errors (session_id, id, kind, error_data) values (${quote(id)}, ${i}, 'javascript_error', ${quote(JSON.stringify(data))})`);
    }
  };

  // track starts a live session over a connection of its own.
  const track = async (test, id, data = {}) => {
    const socket = await t.trackers.evaluateHandle((host) => new Promise((done) => {
      const socket = new WebSocket(`ws://${host}/ws?type=tracker`);
      socket.onopen = () => done(socket);
    }), t.h.host);
    const leave = () => socket.evaluate((socket) => socket.close());
    test.after(leave);
    const say = (type, data) => socket.evaluate((socket, message) => socket.send(JSON.stringify(message)), { type, data });
    const begin = async () => {
      await say("session_start", { sessionId: id, userId: "live user", url: "https://shop.example/live", viewport: { width: 800, height: 600 }, ...data });
      await until(async () => (await t.h.json("/sessions/active")).sessions.some((s) => s.sessionId === id), "the session to start");
    };
    await begin();
    return { say, begin, send: (events) => say("events_batch", { events }), end: () => say("session_end", { sessionId: id }), leave };
  };

  return Object.assign(t, { open, store, track });
}

export const text = (page, selector) => page.textContent(selector);
export const recorded = (page, selector) => page.evaluate((s) => {
  const frame = document.querySelector(".scene.shown iframe");
  return frame?.contentDocument?.querySelector(s)?.textContent ?? null;
}, selector);
export const shows = (page, selector, want) => until(async () => await recorded(page, selector) === want, `${selector} to show ${want}`);
export const reaches = (page, second) => until(async () => Number(await recorded(page, "#clock")) >= second, `the second ${second}`);
export const says = (page, selector, pattern) => until(async () => pattern.test(await text(page, selector)), `${selector} to say ${pattern}`);
export const inState = (page, state) => page.waitForFunction((want) => window.player?.state === want, state);
// loaded waits until the player has read ahead what it wants.
export const loaded = (page) => page.waitForFunction(() => window.player?.scene && !window.player.reading && !(window.player.hasMore() && window.player.wantsAhead()));

// notes has what is opened in a page from now on gather all that it says below its picture.
export async function notes(page) {
  await page.addInitScript(() => addEventListener("DOMContentLoaded", () => {
    window.notes = [];
    const note = document.getElementById("note"), options = { childList: true, characterData: true, subtree: true };
    if (note) new MutationObserver(() => window.notes.push(note.textContent)).observe(note, options);
  }));
  return () => page.evaluate(() => window.notes);
}

// A page with one clock in it: its text is the second of the recording.
export const clockPage = (second) => ({
  type: 0, id: 1, childNodes: [{ type: 2, id: 2, tagName: "html", attributes: {}, childNodes: [
    { type: 2, id: 3, tagName: "head", attributes: {}, childNodes: [] },
    { type: 2, id: 4, tagName: "body", attributes: {}, childNodes: [
      { type: 2, id: 5, tagName: "p", attributes: { id: "clock" }, childNodes: [{ type: 3, id: 6, textContent: String(second) }] },
      { type: 2, id: 7, tagName: "i", attributes: {}, childNodes: [] }] }] }],
});
export const snapshot = (start, second, href = "https://shop.example/") => [
  { type: 4, timestamp: start + second * 1000, data: { href, width: 800, height: 600 } },
  { type: 2, timestamp: start + second * 1000, data: { node: clockPage(second), initialOffset: { left: 0, top: 0 } } },
];
export const change = (start, second, more = {}) => ({
  type: 3, timestamp: start + second * 1000,
  data: { source: 0, texts: [{ id: 6, value: String(second) }], attributes: [], removes: [], adds: [], ...more },
});
export const mouse = (start, second) => ({
  type: 3, timestamp: start + second * 1000, data: { source: 1, positions: [{ x: second % 700, y: 50, id: 4, timeOffset: 0 }] },
});
export const custom = (start, second, tag, payload) => ({ type: 5, timestamp: start + second * 1000, data: { tag, payload } });

// clockChunks makes a recording: a chunk a minute, a full snapshot every `every`
// seconds, `pad` bytes in each event.
export function clockChunks(start, minutes, { every = 300, pad = 0 } = {}) {
  return Array.from({ length: minutes }, (_, minute) => Array.from({ length: 60 }, (_, s) => {
    const second = minute * 60 + s;
    const filler = pad ? { attributes: [{ id: 7, attributes: { title: "x".repeat(pad) } }] } : {};
    return second % every === 0 ? snapshot(start, second) : [change(start, second, filler)];
  }).flat());
}
