// The list of sessions and signing in, in real Chromium, on the real server.
//
//   node --test web/test/list.test.mjs
import assert from "node:assert/strict";
import { test } from "node:test";
import { until } from "./harness.mjs";
import { clockChunks, says, serve, shows, snapshot, text } from "./pages.mjs";

const s = serve({ SESSION_GRACE_PERIOD: "500" });
const { open, store, track } = s;

test("an empty list leads to the demo and shows the tag to embed", async (t) => {
  const page = await open(t, "/");
  await says(page, "#tag", new RegExp(`<script src="${s.h.url}/tracker.js" async></script>`));
  assert.equal(await page.getAttribute("#empty a", "href"), "/demo");
  await page.waitForSelector("#empty:visible");
});

test("live sessions appear first and by themselves, and become recorded ones", async (t) => {
  const page = await open(t, "/");
  await page.waitForSelector("#empty:visible");
  const tracker = await track(t, "comes-and-goes", { lastUrl: "https://shop.example/done", pages: 3, clicks: 12 });
  await page.waitForSelector('#live a[href="/view/comes-and-goes"]');
  assert.match(await text(page, "#live tr"), /live user.*shop\.example\/live → \/done.*Live.*3.*12/s);
  assert.match(await page.title(), /^● 1 · /);
  await tracker.send(snapshot(Date.now(), 0));
  assert.deepEqual((await s.h.json("/sessions?active=false")).sessions, []);
  await tracker.say("visibility_change", { hidden: true });
  await says(page, "#live .state", /In background/);
  await tracker.end();
  await page.waitForSelector('#past a[href="/view/comes-and-goes"]');
  await until(async () => await page.locator("#live tr").count() === 0 && await page.title() === "Sessions", "no live one");
});

test("a live session whose page has gone says so", async (t) => {
  await s.h.restart({ SESSION_GRACE_PERIOD: "3600000" });
  t.after(() => s.h.restart({ SESSION_GRACE_PERIOD: "500" }));
  const tracker = await track(t, "goes");
  const [list, view] = [await open(t, "/"), await open(t, "/view/goes")];
  await says(list, '#live tr:has([href="/view/goes"]) .state', /^Live$/);
  await says(view, "#badge", /^Live$/);
  await tracker.leave();
  await says(list, '#live tr:has([href="/view/goes"]) .state', /^Left$/);
  await says(view, "#badge", /nobody there/);
});

test("a narrow list does not scroll sideways", async (t) => {
  await track(t, "narrow-live");
  await store("narrow-past", [snapshot(Date.now(), 0)], { metadata: { url: `https://shop.example/${"long-".repeat(40)}`, lastUrl: "https://shop.example/", userAgent: "x".repeat(300) } });
  const page = await open(t, "/", { viewport: { width: 390, height: 800 } });
  await page.waitForSelector("#live a");
  await page.waitForSelector("#past a");
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 390);
});

test("10,000 sessions are listed in pages", async (t) => {
  await s.h.sql(`insert into sessions (session_id, user_id, url, metadata, is_active, created_at, ended_at, event_count, first_event_time, last_event_time)
    select 'many-' || n, 'user ' || n, 'https://shop.example/' || n, json_build_object('url', 'https://shop.example/' || n), false,
      now() - n * interval '1 minute', now(), n, 1000, 1000 + n from generate_series(1, 10000) n`);
  t.after(() => s.h.sql("delete from sessions where session_id like 'many-%'"));
  const page = await open(t, "/?url=shop.example/");
  await page.waitForSelector('#past a[href="/view/many-1"]');
  assert.equal(await page.locator("#past tr").count(), 50);
  assert.ok(await page.isDisabled("#newer"));
  await says(page, "#range", /^1 – 50 of 1,000\+$/);
  const first = await text(page, "#past tr:first-child");
  await page.click("#older");
  await says(page, "#range", /^51 – 100 /);
  await until(async () => await text(page, "#past tr:first-child") !== first, "the next page");
  assert.equal(new URL(page.url()).searchParams.get("offset"), "50");
  await page.goto(`${s.h.url}/?url=shop.example/9999`);
  await says(page, "#range", /^1 – 1 of 1$/);
  await page.goto(`${s.h.url}/?offset=10000`);
  await says(page, "#range", /^10,001 – /);
  assert.ok(await page.isDisabled("#older"));
  await page.click("#newer");
  await says(page, "#range", /^9,951 – 10,000 /);
});

test("filters stand in the page's address, and find", async (t) => {
  const visitor = "visitor_dc903e96-eb15-4c97-becb-5102c035976f";
  const agent = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36";
  const start = Date.now() - 3600_000;
  await store("found-bob", clockChunks(start, 2), { user: "bob & co", metadata: { url: "https://shop.example/a%20b", userAgent: agent }, errors: [{ message: "x" }] });
  await store("found-visitor", [snapshot(start, 0)], { user: visitor, metadata: { url: "https://shop.example/cart", pages: 2, clicks: 3 } });
  const shown = async (page) => (await page.locator("#past a[href^='/view/found']").evaluateAll((all) => all.map((a) => a.pathname.split("/").at(-1)))).sort().join(" ");
  const finds = (page, want) => until(async () => await shown(page) === want, `the list to have ${want}`);
  const page = await open(t, "/");
  await finds(page, "found-bob found-visitor");
  const bob = page.locator("#past tr", { has: page.locator("[href='/view/found-bob']") });
  assert.match(await bob.textContent(), /Chrome 142 · Windows/);
  assert.equal(await bob.locator(".errors span").textContent(), "1");
  assert.equal(await page.locator("#past tr", { hasText: "Visitor dc90" }).locator(".errors").textContent(), "");

  await page.fill("[name=url]", "CART");
  await finds(page, "found-visitor");
  assert.equal(new URL(page.url()).search, "?url=CART");
  await page.reload();
  assert.equal(await page.inputValue("[name=url]"), "CART");
  await finds(page, "found-visitor");
  await page.click("#clear");
  await finds(page, "found-bob found-visitor");
  assert.equal(new URL(page.url()).search, "");
  await page.check("[name=errors]");
  await finds(page, "found-bob");
  await page.uncheck("[name=errors]");
  await finds(page, "found-bob found-visitor");
  await page.selectOption("[name=minDuration]", "60000");
  await finds(page, "found-bob");
  await page.selectOption("[name=minDuration]", "");
  const day = (ms) => new Date(ms).toLocaleDateString("sv");
  await page.fill("[name=from]", day(Date.now() + 2 * 86400_000));
  await finds(page, "");
  await page.waitForSelector("#nothing:visible");
  await page.fill("[name=from]", day(Date.now() - 86400_000));
  await page.fill("[name=to]", day(Date.now())); // the whole day
  await finds(page, "found-bob found-visitor");
  await page.click("#clear");

  await page.goto(`${s.h.url}/?userId=0`); // as good a name as any
  await page.fill("[name=url]", "shop");
  await until(() => new URL(page.url()).search === "?userId=0&url=shop" || new URL(page.url()).search === "?url=shop&userId=0", "the question");
  await page.click("#clear");
  await finds(page, "found-bob found-visitor");

  await page.click("text=bob & co"); // a user leads to all of theirs
  await page.waitForSelector("#of-user:visible");
  await finds(page, "found-bob");
  assert.equal(new URL(page.url()).searchParams.get("userId"), "bob & co");
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
  assert.equal(download.suggestedFilename(), "sessions.ndjson");
  page.once("dialog", (d) => d.accept());
  await page.click("#delete");
  await says(page, "#note", /Sessions deleted: 1/);
  await finds(page, "found-visitor");

  await page.locator("#past tr", { hasText: "Visitor dc90" }).click({ position: { x: 700, y: 10 } }); // anywhere in the row
  await page.waitForURL("**/view/found-visitor");
});

test("the tag stays at hand, with its key", async (t) => {
  await s.h.restart({ INGEST_KEY: 'a"b&c' });
  t.after(() => s.h.restart({ INGEST_KEY: "" }));
  await store("there-is-one", [snapshot(Date.now(), 0)]);
  const page = await open(t, "/");
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"], { origin: s.h.url });
  await page.waitForSelector("#past a");
  assert.ok(await page.isHidden("#tag"));
  await page.click("#record");
  await says(page, "#tag", /data-key="a&quot;b&amp;c"/);
  await page.click("#copy-tag");
  await says(page, "#note", /copied/);
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), await text(page, "#tag"));
});

test("signing in and out", async (t) => {
  await s.h.restart({ ACCESS_TOKEN: "correct horse battery" });
  await store("behind-the-door", [snapshot(Date.now(), 0)]);
  const page = await open(t, "/view/behind-the-door");
  assert.equal(await page.title(), "Sign in");
  await page.fill("#token", "wrong horse");
  await page.keyboard.press("Enter");
  await says(page, "#note", /not the access token/);
  assert.equal(await page.getAttribute("#token", "aria-invalid"), "true");
  await page.fill("#token", "correct horse battery");
  await page.click("form button");
  await page.waitForSelector("#stage");
  await shows(page, "#clock", "0"); // at the address that was asked for
  assert.equal(await page.evaluate(() => document.cookie), "", "the cookie is not for scripts");
  await page.click("#signout");
  await page.waitForURL(`${s.h.url}/`);
  await page.waitForSelector("#token");

  const other = await open(t, "/"); // signed out while a page is open
  await other.fill("#token", "correct horse battery");
  await other.click("form button");
  await other.waitForSelector("#past a");
  await other.context().clearCookies();
  await other.click("#past a", { timeout: 5000 }).catch(() => {}); // the list may have noticed by itself
  await other.waitForSelector("#token");
});
