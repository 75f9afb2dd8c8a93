// rrweb's own client, as it is published, records with this server: over its
// WebSocket and, where that is refused, by POST.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { harness, until } from "./harness.mjs";

const KEY = "write-only";
const client = readFileSync(new URL("../node_modules/@rrweb/browser-client/umd/browser-client.js", import.meta.url), "utf8");

let h, browser, site;

before(async () => {
  h = await harness({ INGEST_KEY: KEY });
  browser = await h.launch();
  site = await h.site({
    "/client.js": { type: "text/javascript", body: client },
    "/favicon.ico": "",
    "/": `<!doctype html><title>shop</title><script src="/client.js"></script><body><h1>Shop</h1><button>Buy</button>`,
    "/big": `<!doctype html><script src="/client.js"></script><body><p>${"a large page ".repeat(100_000)}</p><button>Buy</button>`,
  });
});
after(() => h?.close());

// record opens a page, and gives it and the recording's id.
async function record(t, path, { key = KEY, before } = {}) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.said = [];
  page.on("console", (m) => page.said.push(m.text()));
  if (before) await page.addInitScript(before);
  await page.goto(site + path);
  const id = await page.evaluate(([serverUrl, publicApiKey]) => {
    const rrweb = window.rrwebBrowserClient?.default ?? window.rrwebBrowserClient ?? window.rrweb;
    rrweb.start({ serverUrl, publicApiKey, meta: { userId: "ann", plan: "pro" } });
    window.client = rrweb;
    return rrweb.getRecordingId();
  }, [`${h.url}/recordings/{recordingId}/events/ws`, key]);
  return { page, id };
}

const stored = (id, check, what) => until(async () => {
  const events = await h.events(id).catch(() => []);
  return check(events) && events;
}, what);
const has = (tag) => (events) => events.some((e) => e.type === 5 && e.data.tag === tag);

test("rrweb's client is recorded, seen live, replayed and continued", async (t) => {
  const { page, id } = await record(t, "/");
  await stored(id, (events) => events.some((e) => e.type === 2), "a snapshot");

  const viewer = await (await browser.newContext()).newPage();
  t.after(() => viewer.context().close());
  await viewer.goto(`${h.url}/view/${id}`);
  const picture = viewer.frameLocator("iframe").first();
  await picture.getByText("Buy", { exact: true }).waitFor();
  await page.evaluate(() => { document.querySelector("h1").textContent = "Sold out"; });
  await picture.getByText("Sold out").waitFor();

  await page.evaluate(() => { client.addMeta({ plan: "free" }); client.addPageviewMeta({ shelf: 7 }); client.addCustomEvent("mark", 1); });
  const events = await stored(id, has("mark"), "the mark");
  assert.equal(events[0].data.tag, "recording-meta");
  const session = await h.json(`/sessions/${id}`);
  assert.deepEqual([session.userId, session.metadata.plan, session.metadata.shelf, session.metadata.url],
    ["ann", "free", 7, `${site}/`]);

  await page.reload();
  await page.evaluate(([serverUrl, publicApiKey]) => {
    window.client = window.rrwebBrowserClient?.default ?? window.rrwebBrowserClient ?? window.rrweb;
    client.start({ serverUrl, publicApiKey });
    client.addCustomEvent("mark", 2);
  }, [`${h.url}/recordings/{recordingId}/events/ws`, KEY]);
  await stored(id, (all) => all.filter((e) => e.type === 5 && e.data.tag === "mark").length === 2 &&
    all.filter((e) => e.type === 2).length === 2, "the second page in the same session");
  assert.equal((await h.json(`/sessions/${id}`)).metadata.plan, "free");
  assert.deepEqual(page.said, []);

  await page.evaluate(() => client.stop(true));
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the session's end");
});

test("a snapshot over 1 MB comes by POST beside the open WebSocket", async (t) => {
  const { page, id } = await record(t, "/big");
  await page.evaluate(() => client.addCustomEvent("mark", 1));
  const events = await stored(id, (all) => has("mark")(all) && all.some((e) => e.type === 2), "snapshot and mark");
  assert.equal(events.length, new Set(events.map((e) => JSON.stringify(e))).size, "nothing twice");
  assert.equal((await h.sql("select session_id from sessions where event_count > 0")).filter(([other]) => other === id).length, 1);
  assert.deepEqual(page.said, []);
});

test("where WebSockets are refused its POSTs are taken", async (t) => {
  const { id } = await record(t, "/", { before: () => {
    window.WebSocket = class extends WebSocket { constructor(url) { super(url.replace("/events/ws", "/none")); } };
  } });
  const events = await stored(id, (all) => all.some((e) => e.type === 2), "a snapshot");
  assert.equal(events[0].data.tag, "recording-meta");
  assert.equal((await h.json(`/sessions/${id}`)).metadata.plan, "pro");
});

test("with a wrong key nothing is recorded, and the client is told", async (t) => {
  const { page, id } = await record(t, "/", { key: "wrong" });
  await until(() => page.said.some((text) => text.includes("401")), "the client's word about 401");
  assert.deepEqual(await h.sql(`select 1 from sessions where session_id = '${id}'`), []);
});
