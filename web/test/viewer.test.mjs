// The page of one session in real Chromium, on the real server.
//
//   node --test web/test/viewer.test.mjs
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { chromium } from "playwright-core";
import { chromiumOptions, patient, sleep, until } from "./harness.mjs";
import { recording as hostileRecording } from "./hostile.mjs";
import { change, clockChunks, clockPage, custom, inState, loaded, mouse, notes, reaches, recorded, says, serve, shows, snapshot, text } from "./pages.mjs";

const s = serve({ SESSION_GRACE_PERIOD: "500" });
const { open, store, track } = s;

const chunkRequests = (page) => {
  const seen = [];
  page.on("request", (r) => { if (r.url().includes("/chunks/")) seen.push(Number(new URL(r.url()).pathname.split("/").at(-1))); });
  return seen;
};

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
  const own = patient(await chromium.launchPersistentContext(join(dir, "profile"), chromiumOptions(`--log-net-log=${log}`)));
  t.after(async () => {
    await own.close();
    rmSync(dir, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
  });
  const page = await own.newPage();
  const allowed = /^\/(view\/hostile|assets\/(view|api|events|panel|picture|player|recording|scene|story|styles|timeline|rrweb-replay)\.js|assets\/(style|rrweb-replay)\.css|sessions\/hostile(\/errors|\/chunks\/0)?|)$/;
  const strange = [];
  page.on("response", (r) => {
    const { origin, pathname, search } = new URL(r.url());
    if (origin !== s.h.url || !allowed.test(pathname) || search.replace(/^\?of=\d+$/, "")) strange.push(r.url());
  });
  const ended = async () => {
    await inState(page, "ended");
    await shows(page, "#alive", "still alive");
    await sleep(300); // for what should not happen
    assert.deepEqual(await page.evaluate(() => [window.pwned, frames.length, document.activeElement.tagName]), [undefined, 1, "BODY"]);
    const sandboxes = await page.evaluate(() => [...document.querySelectorAll("iframe")].map((f) => f.getAttribute("sandbox")));
    assert.deepEqual(sandboxes, ["allow-same-origin"]);
    assert.equal(await page.locator("main img, main script, header img").count(), 0);
    assert.ok(page.url().startsWith(`${s.h.url}/view/hostile`), page.url());
  };
  await page.goto(`${s.h.url}/view/hostile`);
  await ended();
  await page.keyboard.press(" "); // once more from the start, then by seeking through it
  await inState(page, "playing");
  await ended();
  for (const key of ["ArrowLeft", "ArrowRight", "ArrowLeft"]) await page.keyboard.press(key);
  await until(() => page.evaluate(() => document.activeElement.tagName !== "IFRAME"), "the focus to come back");
  for (let i = 0; i < 15; i++) { // the keyboard never gets into the recording, where Enter would follow links
    await page.keyboard.press("Tab");
    assert.notEqual(await page.evaluate(() => document.activeElement.tagName), "IFRAME");
  }
  await page.goto(`${s.h.url}/?offset=0`);
  await page.waitForSelector('a[href="/view/hostile"]');
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  await own.close();

  assert.deepEqual(requests, []);
  assert.equal(connections, 0, "connections to the attacker's server");
  assert.deepEqual(strange.filter((url) => !/\/(\?offset=0|stats|sessions\?.*|assets\/list\.js)$/.test(url.slice(s.h.url.length))), []);
  assert.deepEqual(readFileSync(log, "utf8").match(/[\w-]+\.evil\.test/g), null, "names looked up");
});

test("live replay shows what the recorded page shows", async (t) => {
  const demo = await s.browser.newPage({ viewport: { width: 1000, height: 700 } });
  t.after(() => demo.close());
  await demo.goto(`${s.h.url}/demo`);
  await demo.waitForFunction(() => window.sessionReplay?.sessionId);
  const id = await demo.evaluate(() => window.sessionReplay.sessionId);
  await until(async () => (await s.h.json(`/sessions/${id}`).catch(() => ({}))).snapshotIndex != null, "a full snapshot");
  const page = await open(t);
  const began = Date.now();
  await page.goto(`${s.h.url}/view/${id}`);
  await page.waitForFunction(() => window.player?.state === "playing" && window.player.following);
  t.diagnostic(`live ${Date.now() - began} ms after opening`); // under a second, on a machine with time to spare
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
      if (node.nodeType !== 1 || gone.includes(node.tagName) || (node.tagName === "OPTION" && /^\*+$/.test(node.text))) return [];
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
  }, "the replay to look like the page").catch(() => assert.deepEqual(replayed, original));
  await says(page, "#lines", /shelf fell down/);

  await demo.goto(`${s.h.url}/demo/checkout`); // the same session goes on
  await until(async () => (await recorded(page, "#pay")) !== null, "the next page");
  await page.waitForSelector("#marks .navigation", { state: "attached" });
});

test("a deep link and seeking load only what they need", async (t) => {
  const start = Date.now() - 5 * 3600_000;
  await store("four-hours", clockChunks(start, 240, { pad: 400 }));
  const page = await open(t);
  const chunks = chunkRequests(page);
  await page.goto(`${s.h.url}/view/four-hours?t=10830`); // 3:00:30
  await inState(page, "playing");
  await page.keyboard.press(" ");
  await inState(page, "paused");
  await reaches(page, 10830);
  assert.match(await text(page, "#now"), /^3:00:3\d$/);
  assert.equal(await text(page, "#length"), "3:59:59");
  await loaded(page);
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
  await loaded(page);
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
  await page.goto(`${s.h.url}/view/partly-away`);
  await inState(page, "playing");
  await scanned;
  await page.evaluate(() => new Promise((done) => setTimeout(done, 100))); // for what should not be said
  assert.equal(await text(page, "#note"), "");
  const seek = () => page.evaluate(() => {
    const slider = document.getElementById("seek");
    slider.value = 400_000; // its snapshot is in the minute before
    slider.dispatchEvent(new Event("change"));
  });
  await seek();
  await says(page, "#note", /There is no such session/);
  await seek();
  await inState(page, "paused");
  assert.equal(await text(page, "#play"), "Play");
  assert.equal(await page.locator("#stage .scene").count(), 1);
  const before = Number(await recorded(page, "#clock"));
  await page.click("#play");
  await reaches(page, before + 2);
  away = false;
  await seek();
  await reaches(page, 400);
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
  const page = await open(t);
  await page.route("**/sessions/large", async (route) => { // as if no more chunks had room in one answer
    const info = await (await route.fetch()).json();
    await route.fulfill({ json: { ...info, chunks: info.chunks.slice(0, 3), moreChunks: true } });
  });
  await page.goto(`${s.h.url}/view/large`);
  await page.route("**/chunks/*", async (route) => { // too slow for the speed: it runs out again and again
    await sleep(100);
    await route.continue();
  });
  await inState(page, "playing");
  await page.selectOption("#speed", "16");
  let most = 0, waits = 0;
  await until(async () => {
    const [state, bytes] = await page.evaluate(() => [window.player.state, window.player.scene.pieces.reduce((sum, p) => sum + p.bytes, 0)]);
    most = Math.max(most, bytes);
    if (state === "loading") waits++;
    return state === "ended";
  }, "the end");
  t.diagnostic(`at most ${Math.round(most / 1e6)} MB of 40 MB were held`);
  assert.ok(waits > 0, "it never ran out");
  assert.ok(most > 8e6 && most < 39e6);
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
  await page.keyboard.press("Home"); // to a whole second
  await shows(page, "#clock", "0");
  const now = () => page.evaluate(() => Math.round((window.player.time - window.player.recording.start) / 1000));
  const at = await now();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await shows(page, "#clock", String(at + 10));
  await page.keyboard.press("ArrowLeft");
  await shows(page, "#clock", String(at + 5));
  assert.equal(new URL(page.url()).search, `?t=${at + 5}`);
  await page.keyboard.press("Shift+ArrowRight");
  await shows(page, "#clock", String(at + 35));
  await page.keyboard.press("5");
  await shows(page, "#clock", "59");
  await page.keyboard.press("End");
  await shows(page, "#clock", "119");
  await page.keyboard.press("Home");
  await shows(page, "#clock", "0");
  await page.keyboard.press("f");
  await page.waitForFunction(() => document.fullscreenElement?.id === "player");
  await page.keyboard.press("f");
  await page.waitForFunction(() => !document.fullscreenElement);
  for (const key of [">", ">", ">", "<"]) await page.keyboard.press(key);
  assert.equal(await page.inputValue("#speed"), "4");
  assert.equal(await page.evaluate(() => window.player.scene.replayer.config.speed), 4);
  await page.keyboard.press("?");
  await page.waitForSelector("#keys[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#keys", { state: "hidden" });

  await page.focus("#seek"); // a slider that a keyboard and a screen reader can use
  await page.keyboard.press("End");
  await shows(page, "#clock", "119");
  assert.equal(await page.getAttribute("#seek", "aria-valuetext"), "1:59 of 1:59");
  await page.keyboard.press("Home");
  await shows(page, "#clock", "0");

  assert.equal(await page.locator("#marks .error").count(), 1);
  await page.click("#lines .error button");
  await shows(page, "#clock", "90");
  assert.equal(new URL(page.url()).search, "?t=90");
  await page.keyboard.press("Home");
  await shows(page, "#clock", "0");
  await page.click("#marks .error");
  await shows(page, "#clock", "90");

  await page.click("#play");
  await playing(true);
  await page.selectOption("#speed", "8");
  await reaches(page, 96);

  page.once("dialog", (d) => d.dismiss());
  await page.click("#delete");
  assert.equal((await s.h.json("/sessions/keys")).sessionId, "keys");
  page.once("dialog", (d) => d.accept());
  await page.click("#delete");
  await page.waitForURL(`${s.h.url}/`);
  await assert.rejects(s.h.json("/sessions/keys"), /404/);
});

test("the link to a moment is copied", async (t) => {
  await store("copied", clockChunks(Date.now() - 600_000, 1));
  const page = await open(t, "/view/copied?t=20");
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"], { origin: s.h.url });
  await inState(page, "playing");
  await page.keyboard.press(" ");
  await inState(page, "paused");
  await page.keyboard.press("c");
  await says(page, "#note", /The link to 0:2\d is copied/);
  const link = await page.evaluate(() => navigator.clipboard.readText());
  assert.match(link, /\/view\/copied\?t=2\d$/);
  assert.equal(link, page.url());
});

test("inactivity is skipped, gaps are told", async (t) => {
  const start = Date.now() - 600_000;
  await store("idle", [[...snapshot(start, 0), mouse(start, 1), change(start, 2)], [change(start, 60)], [
    mouse(start, 100), change(start, 101), custom(start, 143, "gap", { from: start + 101_000, to: start + 143_000 }),
    ...snapshot(start, 143, "https://shop.example/other"), mouse(start, 144), change(start, 145),
  ]]);
  const page = await open(t, "", { skip: true }), said = await notes(page);
  await page.goto(`${s.h.url}/view/idle`);
  await page.waitForSelector("#marks .idle", { state: "attached" });
  await inState(page, "ended");
  const all = (await said()).join("\n");
  assert.match(all, /Skipped 1:\d\d without activity/);
  assert.match(all, /The recording has a gap here of 0:42/);
  assert.equal(await page.locator("#marks .gap").count(), 1);
  assert.equal(await page.locator("#marks .navigation").count(), 1);
  const share = (node) => [node.style.getPropertyValue("--at"), node.style.getPropertyValue("--for")].map(Number);
  assert.deepEqual(await page.locator("#marks .gap").evaluate(share), [101_000, 42_000]);
  assert.deepEqual(await page.locator("#marks .idle").evaluateAll((nodes, f) => nodes.map(eval(f)), `(${share})`), [[1000, 99_000]]);

  // Without skipping, gaps are skipped all the same; the choice is remembered.
  await page.uncheck("#skip");
  await page.goto(`${s.h.url}/view/idle?t=100`);
  await page.waitForFunction(() => window.player?.scene);
  assert.equal(await page.isChecked("#skip"), false);
  await inState(page, "ended");
  await says(page, "#note", /gap here of 0:42/); // it stays
  assert.doesNotMatch((await said()).join("\n"), /Skipped/);
});

// A page of which much can be told: a button, a field with its label, and what the
// tracker has left out.
const node = (id, tagName, attributes, ...childNodes) => ({ type: 2, id, tagName, attributes, childNodes });
const label = (id, textContent) => ({ type: 3, id, textContent });
const shop = { type: 0, id: 1, childNodes: [node(2, "html", {}, node(3, "head", {}, node(4, "title", {}, label(5, "Shop"))),
  node(6, "body", {}, node(7, "button", {}, label(8, "Add to cart")), node(9, "p", {}, label(10, "Read me")),
    node(11, "label", { for: "mail" }, label(12, "E-mail")), node(13, "input", { id: "mail" }),
    node(14, "img", { src: "data:,left-out" }), node(15, "form", { "data-replay-left-out": "form", rr_width: "200px", rr_height: "80px" }),
    node(16, "select", { value: "********" }, node(17, "option", {}, label(18, "S")), node(19, "option", {}, label(20, "M")))))] };
const start = Date.now() - 600_000;
const shopEvent = (second, type, data) => ({ type, data, timestamp: start + second * 1000 });
const click = (second, id) => shopEvent(second, 3, { source: 2, type: 2, id, x: 9, y: 9 });
const noted = (second, attributes, text) => shopEvent(second, 3, { source: 0, adds: [], removes: [],
  attributes: [{ id: 9, attributes }], texts: text ? [{ id: 10, value: text }] : [] });
const visit = [
  shopEvent(0, 4, { href: "https://shop.example/", width: 800, height: 600 }), shopEvent(0, 2, { node: shop, initialOffset: { left: 0, top: 0 } }),
  click(1, 8), noted(1.1, {}, "Read me"), click(3, 7), click(3.3, 7), click(3.6, 7), noted(3.7, {}, "Read me"),
  click(5, 9), noted(5.1, { "replay-state": "focus" }), click(9, 13), shopEvent(9.2, 3, { source: 5, id: 13, text: "****", isChecked: false }),
  click(10.999, 7), custom(start, 11, "paid", { amount: 42 }), custom(start, 13, "navigation", { href: "https://shop.example/cart#top", title: "Cart" }),
  custom(start, 14, "visibility", { hidden: true }), custom(start, 15, "too-large", {}),
];

test("what happened is told, in words", async (t) => {
  const errors = [12, 12.5].map((second) => ({ message: "it broke", stack: "at shop.js:1", timestamp: start + second * 1000 }));
  await store("told", [visit], { errors });
  const page = await open(t, "/view/told?t=14");
  await inState(page, "ended");
  await says(page, "#lines", /it broke ×2/); // asked for by itself
  assert.deepEqual(await page.locator("#lines > li > button").evaluateAll((all) => all.map((b) => b.innerText.split(/\s+/).join(" "))), [
    "0:00 Began on shop.example/ Shop", "0:01 Clicked “Add to cart”", "0:03 Clicked “Add to cart” ×3rage click",
    "0:05 Clicked “Read me” dead click", "0:09 Typed in “E-mail”", "0:10 Clicked “Add to cart”", '0:11 paid {"amount":42}', "0:12 it broke ×2",
    "0:13 Went to shop.example/cart#top Cart", "0:14 Tab hidden", "0:15 From here on the page was too large to be recorded",
  ]);
  assert.match(await text(page, "#note"), /too large to be recorded/);
  assert.equal(await text(page, "#address"), "https://shop.example/cart#top");
  await page.click("#lines summary");
  assert.equal(await text(page, "#lines details"), "Stack and timesat shop.js:10:12");

  const at = (want) => until(() => page.evaluate((second) => {
    const { time, recording } = window.player; // a moment is shown by a millisecond more
    return [0, 1].includes(time - recording.start - 1000 * second);
  }, want), `the second ${want}`);
  await page.keyboard.press("Home");
  for (const second of [1, 3, 5]) {
    await page.keyboard.press("n");
    await at(second);
  }
  await page.keyboard.press("p");
  await at(3);
  await page.hover("#marks .event");
  assert.match(await page.getAttribute("#marks .event", "title"), /^0:11 +paid$/);
  await page.click("#marks .event");
  await at(11);
  await page.keyboard.press("p");
  await at(9.2);
  await page.click("#marks .event");
  await at(11);
  await page.click('#filters [value="click"]');
  assert.equal(await page.locator("#lines li:visible").count(), 4);
  assert.equal((await page.locator("#filters [value=click]").innerText()).replace(/\s+/, " "), "Clicks 6");
  await page.keyboard.press("p");
  await at(5);
});

test("what the tracker has left out is marked", async (t) => {
  await store("left-out", [visit]);
  const page = await open(t, "/view/left-out");
  await inState(page, "playing");
  await until(() => page.evaluate(() => {
    const { contentDocument: doc } = document.querySelector(".scene.shown iframe");
    const [image, form, select] = ["img", "form", "select"].map((name) => doc.querySelector(name));
    return decodeURIComponent(image.src).includes("too large to be recorded") && image.offsetWidth > 100
      && decodeURIComponent(form.style.backgroundImage).includes("a form that cannot be recorded") && form.offsetHeight === 80
      && select.selectedOptions[0].text === "*"; // as wide as its options
  }), "the marks");

  const tracker = await track(t, "large-at-once");
  const live = await open(t, "/view/large-at-once");
  await says(live, "#message", /Waiting/);
  await tracker.send([custom(start, 0, "too-large", {})]);
  await says(live, "#message", /too large to be recorded/);
  await tracker.end();
  await live.reload();
  await says(live, "#message", /too large to be recorded/);
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
  await shows(page, "#clock", "30");
  assert.equal(await page.getAttribute("#live", "aria-pressed"), "true");
  assert.equal(new URL(page.url()).search, "");

  await tracker.say("javascript_error", { message: "broke just now", timestamp: start + 30_000 });
  await says(page, "#lines", /broke just now/);
  await page.route("**/sessions/lives", async (route) => { // a slow answer: meanwhile it plays on
    await page.waitForFunction(() => window.player.state !== "loading" && document.getElementById("note").textContent.includes("has ended"));
    await route.continue();
  });
  await tracker.end();
  await says(page, "#note", /has ended/);
  await page.waitForSelector("#badge", { state: "hidden" });
  await page.waitForSelector("#live", { state: "hidden" });
  await inState(page, "ended");
  await page.click("#play");
  await reaches(page, 1);
  assert.ok(Number(await recorded(page, "#clock")) < 30);
});

test("an error that comes live and is read as well is told once", async (t) => {
  const tracker = await track(t, "told-once");
  await tracker.send([...snapshot(start, 0), change(start, 1)]);
  const page = await open(t);
  await page.route("**/told-once/errors", async (route) => {
    await page.waitForFunction(() => window.player?.following && window.player.scene);
    await tracker.say("javascript_error", { message: "it broke", timestamp: start });
    await says(page, "#lines", /it broke/);
    await until(async () => (await s.h.json("/sessions/told-once/errors")).errors.length === 1, "the error to be stored");
    await route.continue();
  });
  const answer = page.waitForResponse("**/told-once/errors");
  await page.goto(`${s.h.url}/view/told-once`);
  await (await answer).finished();
  await tracker.say("javascript_error", { message: "something else", timestamp: start + 1000 });
  await says(page, "#filters [value=error]", /Errors 2/);
  assert.equal(await page.locator("#lines .error .tag").count(), 0);
});

test("a session that comes back after its end is followed again", async (t) => {
  const start = Date.now();
  let tracker = await track(t, "comes-back");
  await tracker.send(snapshot(start, 0));
  const page = await open(t, "/view/comes-back");
  await shows(page, "#clock", "0");
  const follows = async (second) => {
    await tracker.send([change(start, second)]);
    await shows(page, "#clock", String(second));
    assert.deepEqual([await text(page, "#badge"), await page.getAttribute("#live", "aria-pressed"), await text(page, "#note")], ["Live", "true", ""]);
  };
  await s.h.restart();
  await says(page, "#note", /has ended/);
  await inState(page, "ended");
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

test("a live session of which nothing is committed has its times", async (t) => {
  const start = Date.now() - 5000;
  const tracker = await track(t, "uncommitted");
  await tracker.send(snapshot(start, 0));
  await tracker.send([mouse(start, 1), custom(start, 2, "mark", 1), change(start, 3)]);
  const page = await open(t);
  await page.route("**/sessions/uncommitted", async (route) => { // as it is until BATCH_INTERVAL has passed
    const info = await (await route.fetch()).json();
    return route.fulfill({ json: { ...info, chunks: [], eventCount: 0, startTime: null, endTime: null, snapshotIndex: null } });
  });
  await page.goto(`${s.h.url}/view/uncommitted`);
  await says(page, "#lines", /^0:0[0-9]/);
  await says(page, "#duration", /0:0[1-9]/);
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
  await page.goto(`${s.h.url}/view/missed-snapshot`);
  await says(page, "#message", /Waiting/);
  await wires[0].close({ code: 4999 });
  await tracker.send(snapshot(start, 1));
  await until(async () => (await s.h.json("/sessions/missed-snapshot")).snapshotIndex === 2, "the snapshot");
  there();
  await shows(page, "#clock", "1");
  await tracker.send([change(start, 2)]);
  await shows(page, "#clock", "2");
});

test("a session without any event says so; its first one is shown, whatever time was asked for", async (t) => {
  const start = Date.now();
  const tracker = await track(t, "nothing");
  const page = await open(t, "/view/nothing?t=0");
  await says(page, "#message", /Waiting/);
  await tracker.end();
  await says(page, "#message", /Nothing was recorded/);
  await page.reload();
  await says(page, "#message", /Nothing was recorded/);
  await tracker.begin();
  await page.reload();
  await says(page, "#message", /Waiting/);
  await tracker.send([...snapshot(start, 0), change(start, 1)]);
  await shows(page, "#clock", "1");
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
    await page.waitForFunction((n) => window.player.recording.total >= n, 3 + i); // each a batch of its own
  }
  await shows(page, "#clock", "2.5");
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
  await says(page, "#note", /Deleting failed/);
  await tracker.send([change(start, 1)]);
  await shows(page, "#clock", "1");
});

test("a lost connection is told, and mended", async (t) => {
  const tracker = await track(t, "cut-off");
  const start = Date.now();
  await tracker.send(snapshot(start, 0));
  const page = await open(t, "/view/cut-off");
  const list = await open(t, "/");
  await shows(page, "#clock", "0");
  await list.waitForSelector("#live a");
  await s.h.kill();
  await says(page, "#note", /Connection lost; trying again in \d+ s/);
  await says(list, "#note", /Connection lost; trying again in \d+ s/);
  await s.h.start();
  await says(page, "#note", /Connected again|has ended/);
  await says(list, "#note", /^$/);
});

test("a session that is not there, one without a picture", async (t) => {
  const page = await open(t, "/view/never-was");
  await says(page, "#message", /There is no such session/);
  await store("no-snapshot", [[change(1e12, 0), change(1e12, 1)]]);
  await page.goto(`${s.h.url}/view/no-snapshot`);
  await says(page, "#message", /no full snapshot/);
});

test("a session that is deleted while it plays is played as far as it is here", async (t) => {
  await store("short-lived", clockChunks(Date.now() - 3600_000, 10));
  const page = await open(t, "/view/short-lived?t=100");
  await page.waitForFunction(() => window.player?.state === "playing" && !window.player.wantsAhead());
  await s.h.sql("delete from sessions where session_id = 'short-lived'");
  await page.route("**/chunks/*", async (route) => { // answered when all is played
    await page.waitForFunction(() => window.player.state === "loading");
    await route.continue();
  });
  await page.selectOption("#speed", "16");
  await says(page, "#note", /There is no such session/);
  await inState(page, "ended");
  await shows(page, "#clock", "179");
});

test("a session that is recorded anew under the id of a deleted one is not taken for it", async (t) => {
  const first = Date.now() - 3600_000;
  await store("again", [[...snapshot(first, 0), change(first, 7)]]);
  const page = await open(t, "/view/again?t=7"); // its chunk stays in the browser's cache
  await shows(page, "#clock", "7");
  await s.h.sql("delete from sessions where session_id = 'again'");
  await store("again", [[...snapshot(first, 0), change(first, 8)]]);
  await page.goto(`${s.h.url}/view/again?t=8`);
  await shows(page, "#clock", "8");
});

test("who wants no motion sees none", async (t) => {
  const css = "@keyframes turn { to { rotate: 1turn } } p { animation: turn 100s infinite }";
  const page = clockPage(0);
  page.childNodes[0].childNodes[0].childNodes.push({ type: 2, id: 20, tagName: "style", attributes: { _cssText: css }, childNodes: [] });
  const [meta, full] = snapshot(start, 0);
  await store("turns", [[meta, { ...full, data: { ...full.data, node: page } }, change(start, 1), change(start, 300)]]);
  for (const [reducedMotion, want] of [["no-preference", "running"], ["reduce", "paused"]]) {
    const view = await open(t, "/view/turns", { reducedMotion });
    await inState(view, "playing");
    await view.waitForFunction((state) => {
      const animations = document.querySelector(".scene.shown iframe").contentDocument.getAnimations();
      return window.player.state === "playing" && animations.length === 1 && animations[0].playState === state;
    }, want);
    const tail = await view.evaluate(() => window.player.scene.replayer.config.mouseTail);
    assert.equal(Boolean(tail), want === "running");
  }
});

// faint gives what cannot be seen well enough: text under 4.5:1, edges of fields and
// marks under 3:1. What is under the pointer has grounds of its own.
const faint = () => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const light = (colors) => { // of colours that lie one over the other
    const key = colors.join();
    if (!known.has(key)) known.set(key, measured(colors));
    return known.get(key);
  };
  const measured = (colors) => {
    for (const color of colors) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => (v > 10 ? ((v / 255 + 0.055) / 1.055) ** 2.4 : v / 255 / 12.92));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const found = [];
  const check = (what, color, grounds, least) => {
    const [a, b] = [light([...grounds, color]), light(grounds)];
    const ratio = Math.max(a, b) / Math.min(a, b);
    if (ratio < least) found.push(`${what}: ${color} on ${grounds.at(-1)} is ${ratio.toFixed(2)}`);
    checked++;
  };
  let checked = 0;
  const root = getComputedStyle(document.documentElement), named = (name) => root.getPropertyValue(`--${name}`);
  if (named("now")) { // the demo has colours of its own, and nothing that changes under the pointer
    for (const over of ["text", "quiet", "accent", "bad", "live", "warn", "event"]) {
      for (const ground of ["card", "ground", "hover", "now"]) check(`--${over} on --${ground}`, named(over), [named(ground)], 4.5);
    }
    check("played", named("played"), [named("track")], 3);
  }
  const grounds = (el) => (el ? [...grounds(el.parentElement), getComputedStyle(el).backgroundColor] : ["white"]);
  for (const el of document.querySelectorAll("body *:not(.scene *)")) {
    const style = getComputedStyle(el), name = `${el.localName}#${el.id}.${el.className}`;
    if (!el.checkVisibility({ visibilityProperty: true })) continue;
    const hasText = [...el.childNodes].some((child) => child.nodeType === 3 && child.data.trim()) || el.matches("select, input");
    if (hasText && !el.disabled && style.backgroundImage === "none") check(name, style.color, grounds(el), 4.5);
    if (el.placeholder) check(`${name}::placeholder`, getComputedStyle(el, "::placeholder").color, grounds(el), 4.5);
    if (el.matches("button, select, input:not([type=range], [type=checkbox])") && style.borderTopWidth !== "0px" && !el.matches(".danger")) {
      check(`${name}'s edge`, style.borderTopColor, grounds(el.parentElement), 3);
    }
    if (el.matches(".sign, .marks span:not(.gap, .idle)")) {
      const shape = el.matches(".sign") ? style : getComputedStyle(el, "::before");
      check(name, shape.backgroundColor, grounds(el.parentElement), 3);
    }
  }
  return { found, checked };
};

test("what is on the pages can be seen, in light and dark", async (t) => {
  await store("seen", [visit], { errors: [{ message: "it broke", stack: "at shop.js:1", timestamp: start + 12_000 }] });
  const tracker = await track(t, "seen-live");
  await tracker.send(snapshot(start, 0));
  const signIn = readFileSync(new URL("../signin.html", import.meta.url), "utf8");
  for (const colorScheme of ["light", "dark"]) {
    const page = await open(t, "/?userId=ann", { colorScheme });
    const look = async (what, least) => {
      const { found, checked } = await page.evaluate(`(${faint})()`);
      assert.deepEqual(found, [], `${what}, ${colorScheme}`);
      assert.ok(checked > least, `${what}: ${checked} were looked at`);
    };
    await page.waitForSelector("#past .errors span:not(:empty)");
    await page.click("#record");
    await look("the list of a user", 80);
    await page.goto(`${s.h.url}/?userId=nobody`);
    await page.waitForSelector("#nothing:visible");
    await look("an empty list", 50);
    await page.goto(`${s.h.url}/view/seen?t=15`);
    await inState(page, "ended");
    await page.click("#more-about summary");
    await page.click("#lines summary");
    await look("a session", 120);
    await page.keyboard.press("?");
    await look("the keys", 120);
    await page.goto(`${s.h.url}/view/seen-live`);
    await says(page, "#lines", /Began on/);
    await shows(page, "#clock", "0");
    await look("a live session", 60);
    await page.route(`${s.h.url}/`, (route) => route.fulfill({ contentType: "text/html", body: signIn }));
    await page.goto(`${s.h.url}/`);
    await page.evaluate(() => { document.getElementById("note").textContent = "This is not the access token."; });
    await look("signing in", 30);
    await page.goto(`${s.h.url}/demo`);
    await look("the demo", 40);
    await page.goto(`${s.h.url}/demo/checkout`);
    await look("its checkout", 20);
  }
});
