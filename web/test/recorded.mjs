// What tests of recording share: a web site that embeds the tracker, visits to it,
// and a look at what of them is stored.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { gunzipSync } from "node:zlib";
import { harness, until } from "./harness.mjs";

export let h, browser, site;
let replayer; // a page for playable
export const pages = {}; // path → page, of a web site that embeds the tracker

export async function open(env) {
  h = await harness(env);
  browser = await h.launch({
    args: ["--host-resolver-rules=MAP insecure.test 127.0.0.1"],
    ignoreDefaultArgs: ["--disable-back-forward-cache"],
  });
  site = await h.site(pages);
  replayer = await browser.newPage();
  await replayer.evaluate(readFileSync(new URL("../dist/rrweb-replay.js", import.meta.url), "utf8"));
  // A copy of the script on the site itself loads while the server is away.
  pages["/tracker.js"] = { type: "text/javascript", body: await (await fetch(`${h.url}/tracker.js`)).text() };
}
export const close = () => h?.close();

// embed puts a page on the site, and gives its URL.
export function embed(path, body, attributes = "", src = `${h.url}/tracker.js`) {
  pages[path] = `<!doctype html><meta charset="utf-8"><title>${path}</title>
    <script src="${src}" ${attributes}></script><body>${body}`;
  return site + path;
}

// movable is a script for a page's start: window.move(ms) sets the browser's
// clocks forward, those that tracker.js goes by. A reload keeps the time of day.
export const movable = () => {
  const before = Number(sessionStorage.getItem("moved"));
  let here = 0;
  window.move = (ms) => { here += ms; sessionStorage.setItem("moved", before + here); };
  for (const [type, name, gone] of [[Event, "timeStamp", () => here], [File, "lastModified", () => before + here]]) {
    const { get } = Object.getOwnPropertyDescriptor(type.prototype, name);
    Object.defineProperty(type.prototype, name, { get() { return get.call(this) + gone(); } });
  }
};

// visit opens a URL in a browser without memory, and collects what goes wrong in it.
export async function visit(t, url, { script } = {}) {
  const context = await browser.newContext();
  t.after(() => context.close());
  if (script) await context.addInitScript(script);
  const page = await context.newPage();
  page.wrong = [];
  page.on("pageerror", (error) => page.wrong.push(error.message));
  page.on("console", (m) => { if (m.type() === "debug" && m.text().startsWith("session-replay:")) page.wrong.push(m.text()); });
  if (url) await page.goto(url);
  return page;
}

export const sessionOf = (page) => until(() => page.evaluate(() => window.sessionReplay?.sessionId), "a session's id");

// mark records n custom events, numbered over the life of a page's test.
export async function mark(page, n) {
  page.marks ??= 0;
  await until(() => page.evaluate(() => Boolean(window.sessionReplay?.event)), "the tracker");
  await page.evaluate(([from, to]) => { for (let i = from; i < to; i++) window.sessionReplay.event("mark", i); }, [page.marks, page.marks + n]);
  page.marks += n;
}

export const customs = (events, tag) => events.filter((e) => e.type === 5 && e.data.tag === tag).map((e) => e.data.payload);

// arrived waits until the last mark is stored, and checks that each is there
// once and in order, in chunks without gap or overlap.
export async function arrived(page, id) {
  const last = page.marks - 1;
  const events = await until(async () => {
    const all = await h.events(id).catch(() => []);
    return customs(all, "mark").includes(last) && all;
  }, `mark ${last} of ${id}`).catch(async (error) => {
    const now = await page.evaluate(() => window.sessionReplay.sessionId);
    throw new Error(`${error.message}; the page's session is ${now}`);
  });
  assert.deepEqual(customs(events, "mark"), Array.from({ length: page.marks }, (_, i) => i));
  let next;
  await until(async () => {
    next = 0;
    for (const { fromIndex, count } of (await h.json(`/sessions/${id}`)).chunks) {
      assert.equal(fromIndex, next);
      next += count;
    }
    return next >= events.length;
  }, "commit");
  return events;
}

// playable replays all events with rrweb and fails if one of them finds no node.
export async function playable(events) {
  const warnings = [];
  const hear = (m) => { if (m.type() === "warning" || m.type() === "error") warnings.push(m.text()); };
  replayer.on("console", hear);
  const text = await replayer.evaluate((events) => {
    const replayer = new window.rrwebReplay.Replayer(events, { showWarning: true, mouseTail: false });
    replayer.pause(events.at(-1).timestamp - events[0].timestamp + 1);
    const text = replayer.iframe.contentDocument.body.innerText;
    replayer.destroy();
    return text;
  }, events);
  replayer.off("console", hear);
  assert.deepEqual(warnings.filter((w) => /not found|\[replayer\]/i.test(w)), []);
  return text;
}

// everything gives all that the database keeps, as one text.
export async function everything() {
  const chunks = await h.sql("select encode(events, 'hex') from session_events");
  const rest = await h.sql("select s::text from sessions s union all select e::text from session_errors e");
  return chunks.map(([hex]) => gunzipSync(Buffer.from(hex, "hex")).toString()).concat(rest.flat()).join("\n");
}

// established gives the session's id once the server has something of it: a page
// that is left before the server's first answer gets another session.
export async function established(page) {
  const id = await sessionOf(page);
  await mark(page, 1);
  await arrived(page, id);
  return id;
}

export const sessionCount = async () => Number((await h.sql("select count(*) from sessions"))[0]);

