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
  assert.ok(await page.isVisible("#empty"));
});

test("live sessions appear first and by themselves, and become recorded ones", async (t) => {
  const page = await open(t, "/");
  await page.waitForSelector("#empty:visible");
  const tracker = await track(t, "comes-and-goes");
  await page.waitForSelector('#live a[href="/view/comes-and-goes"]', { timeout: 3000 });
  assert.match(await text(page, "#live tr"), /live user.*shop\.example\/live/);
  await tracker.send(snapshot(Date.now(), 0));
  await says(page, "#live td:nth-child(5)", /^2$/);
  assert.deepEqual((await s.h.json("/sessions?active=false")).sessions, []);
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
  await s.h.sql(`insert into sessions (session_id, user_id, url, metadata, is_active, created_at, ended_at, event_count, first_event_time, last_event_time)
    select 'many-' || n, 'user ' || n, 'https://shop.example/' || n, json_build_object('url', 'https://shop.example/' || n), false,
      now() - n * interval '1 minute', now(), n, 1000, 1000 + n from generate_series(1, 10000) n`);
  const page = await open(t);
  const began = Date.now();
  await page.goto(`${s.h.url}/`);
  await page.waitForSelector('#past a[href="/view/many-1"]');
  assert.ok(Date.now() - began < 2000, `the list took ${Date.now() - began} ms`);
  assert.equal(await page.locator("#past tr").count(), 50);
  assert.ok(await page.isDisabled("#newer"));
  const first = await text(page, "#past tr:first-child");
  await page.click("#older");
  await says(page, "#range", /^51 – 100$/);
  await until(async () => await text(page, "#past tr:first-child") !== first, "the next page");
  assert.equal(new URL(page.url()).search, "?offset=50");
  await page.goto(`${s.h.url}/?offset=10000`);
  await says(page, "#range", /^10,001 – /);
  assert.ok(await page.isDisabled("#older"));
  await page.click("#newer");
  await says(page, "#range", /^9,951 – 10,000$/);
  await s.h.sql("delete from sessions where session_id like 'many-%'");
});

test("signing in and out", async (t) => {
  await s.h.restart({ ACCESS_TOKEN: "correct horse" });
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
  await page.waitForURL(`${s.h.url}/`);
  await page.waitForSelector("#token");

  const other = await open(t, "/"); // signed out while a page is open
  await other.fill("#token", "correct horse");
  await other.click("form button");
  await other.waitForSelector("#past a");
  await other.context().clearCookies();
  await other.click("#past a", { timeout: 2000 }).catch(() => {}); // the list may have noticed by itself
  await other.waitForSelector("#token");
});
