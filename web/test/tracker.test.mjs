// Recording, in real Chromium against the real server: what is recorded arrives
// once and in order whatever happens between, and what is private never leaves.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { gzipSync } from "node:zlib";
import { sleep, until } from "./harness.mjs";
import { arrived, close, customs, embed, established, everything, h, mark, movable, open, pages, playable, sessionCount, sessionOf, site, visit } from "./recorded.mjs";

before(() => open({ SESSION_GRACE_PERIOD: "600000" })); // no session ends by itself
after(close);

const file = (name) => readFileSync(new URL(`pages/${name}`, import.meta.url), "utf8");

test("the demo, reloaded, left and come back to, is one session", async (t) => {
  const page = await visit(t, `${h.url}/demo`);
  const id = await established(page);
  await page.click("text=Add >> nth=0");
  await mark(page, 30);
  await page.reload();
  await mark(page, 60);
  await page.click("text=Go to checkout");
  await page.fill("[name=street]", "Somewhere");
  await mark(page, 10);
  await page.goto(`${h.url}/demo`);
  await mark(page, 5);
  await page.goBack({ waitUntil: "commit" }); // from the cache: there is no load event
  await mark(page, 5);
  assert.equal(await sessionOf(page), id);
  const events = await arrived(page, id);
  assert.ok(events.filter((e) => e.type === 2).length >= 4, "each page brings a full snapshot");
  assert.ok(events.filter((e) => e.type === 4).some((e) => e.data.href === `${h.url}/demo/checkout`));
  assert.match(await playable(events), /Checkout/);
  assert.deepEqual(page.wrong, []);
  const { metadata } = await h.json(`/sessions/${id}`);
  assert.match(metadata.url, /\/demo/);
});

test("many quick reloads lose nothing", async (t) => {
  const page = await visit(t, embed("/quick", "<p>quick"));
  const id = await established(page);
  for (let i = 0; i < 10; i++) {
    await mark(page, 7);
    await page.reload({ waitUntil: "commit" });
    await page.waitForFunction(() => window.sessionReplay);
  }
  await mark(page, 1);
  await arrived(page, id);
  assert.deepEqual(page.wrong, []);
});

test("a duplicated tab takes a session of its own", async (t) => {
  const page = await visit(t, embed("/twice", "<p>twice"));
  const id = await established(page);
  const opening = page.context().waitForEvent("page");
  await page.evaluate(() => { window.dispatchEvent(new Event("pagehide")); }); // what a browser copies has been stored
  await page.evaluate(() => { window.dispatchEvent(Object.assign(new Event("pageshow"), { persisted: true })); });
  await until(() => page.evaluate(() => window.sessionReplay.sessionId), "the session");
  await page.evaluate(() => window.open(location.href)); // copies sessionStorage
  const other = await opening;
  const otherId = await sessionOf(other);
  assert.notEqual(otherId, id);
  other.marks = 0;
  await mark(other, 5);
  await mark(page, 5);
  await arrived(page, id);
  await arrived(other, otherId);
  assert.equal(await sessionOf(page), id);
});

test("the server is killed and started again, twice", async (t) => {
  const page = await visit(t, embed("/killed", "<p id=p>killed"));
  const id = await established(page);
  for (let i = 0; i < 2; i++) {
    await mark(page, 120); // two batches at once, sent and hardly acked
    await h.kill();
    await mark(page, 60);
    await page.evaluate(() => { document.getElementById("p").textContent += "!"; });
    await h.start();
    await mark(page, 40);
  }
  const events = await arrived(page, id);
  assert.equal(events.filter((e) => e.type === 2).length, 1, "nothing was lost, so no new snapshot was needed");
  assert.match(await playable(events), /killed!!/);
  assert.deepEqual(page.wrong, []);
});

test("a page is left while the server is away", async (t) => {
  const page = await visit(t, embed("/away", "<p>away", `data-endpoint="${h.url}"`, "/tracker.js"));
  const id = await established(page);
  embed("/away2", "<p>away too", `data-endpoint="${h.url}"`, "/tracker.js");
  await h.kill();
  await mark(page, 20);
  await page.goto(`${site}/away2`);
  await mark(page, 20);
  await page.reload();
  await mark(page, 20);
  await h.start();
  const events = await arrived(page, id);
  await playable(events);
});

test("offline and back", async (t) => {
  const page = await visit(t, embed("/offline", "<p>offline"));
  const id = await established(page);
  await page.context().setOffline(true);
  await until(() => page.evaluate(() => window.sessionReplay.state.reason === "offline"), "the reason");
  await mark(page, 100);
  await page.context().setOffline(false);
  await mark(page, 10);
  await arrived(page, id);
  let connections = 0;
  page.on("websocket", () => connections++);
  await page.evaluate(() => window.dispatchEvent(new Event("offline"))); // a connection that was there is not trusted
  await until(() => connections > 0, "a new connection");
  await mark(page, 10);
  await arrived(page, id);
});

test("a full buffer makes an honest gap", async (t) => {
  const page = await visit(t, embed("/full", "<p id=p>full"));
  const id = await established(page);
  for (const n of [2, 3]) {
    await h.kill();
    await page.evaluate(() => {
      for (let i = 0; i < 45; i++) window.sessionReplay.event("big", "x".repeat(1 << 19));
      document.getElementById("p").textContent = "not seen happening";
    });
    await page.evaluate(() => { document.getElementById("p").textContent = "after the gap"; });
    await h.start();
    const snapshots = async () => (await h.json(`/sessions/${id}`)).chunks.filter((c) => c.snapshotIndex !== null);
    await until(async () => (await snapshots()).length === n, "another snapshot");
  }
  const events = await h.events(id), snapshots = events.filter((e) => e.type === 2);
  assert.equal(snapshots.length, 3);
  assert.ok(snapshots[2].timestamp - snapshots[1].timestamp > 9000, "they do not follow each other at once");
  const tail = events.slice(events.findIndex((e) => e.data.tag === "gap")).map((e) => e.type);
  assert.deepEqual(tail.slice(0, 3), [5, 4, 2]);
  const [gap] = customs(events, "gap");
  assert.ok(gap.to > gap.from, JSON.stringify(gap));
  assert.ok(customs(events, "big").length >= 16);
  assert.match(await playable(events.filter((e) => e.data.tag !== "big")), /after the gap/);
  await mark(page, 3);
  await arrived(page, id);
});

test("a full buffer goes on when another connection says that all of it is stored", async (t) => {
  const script = () => {
    window.WebSocket = class extends WebSocket {
      constructor(...given) { super(...given); window.socket = this; }
      set onmessage(f) { super.onmessage = (e) => { if (!window.isDeaf || !e.data.includes("events_ack")) f(e); }; }
    };
  };
  const page = await visit(t, embed("/deaf", "<p id=p>full"), { script });
  const id = await established(page), stored = async () => (await h.json(`/sessions/${id}`)).eventCount;
  await page.evaluate(() => {
    window.isDeaf = true;
    for (let i = 0; i < 45; i++) window.sessionReplay.event("big", "x".repeat(1 << 19));
  });
  let before = 0;
  await until(async () => {
    const now = await stored(), isAll = now > 30 && now === before;
    before = now;
    await sleep(500);
    return isAll;
  }, "all that is held to be stored");
  await page.evaluate(() => { window.isDeaf = false; window.socket.close(); });
  await until(async () => (await h.events(id)).filter((e) => e.type === 2).length === 2, "a snapshot behind the gap");
  await mark(page, 1);
  assert.equal(customs(await arrived(page, id), "gap").length, 1);
});

test("what does not fit into sessionStorage is said to be missing; the rest leaves it once it is stored", async (t) => {
  const page = await visit(t, embed("/quota", "<p id=p>quota", `data-endpoint="${h.url}"`, "/tracker.js"));
  const id = await established(page);
  await h.kill();
  await page.evaluate(() => {
    for (let i = 0; i < 300; i++) window.sessionReplay.event("big", `${i}`.padEnd(20_000, "x"));
    document.getElementById("p").textContent = "changed";
  });
  await page.reload();
  const used = () => page.evaluate(() => sessionStorage.getItem("session-replay").length);
  assert.ok(await used() > 1e6);
  await h.start();
  await mark(page, 1);
  const events = await arrived(page, id);
  await until(async () => await used() < 10_000, "the page's room");
  assert.ok(customs(events, "gap").length > 0);
  const kept = customs(events, "big").map((x) => parseInt(x, 10));
  assert.ok(kept.length >= 50 && kept.length < 150, `${kept.length} kept`);
  assert.deepEqual(kept, kept.map((_, i) => i));
  await playable(events);
});

test("a full snapshot every five minutes of activity; a visit ends after thirty idle ones", async (t) => {
  const page = await visit(t, embed("/clock", "<p id=p>clock"), { script: movable });
  const move = (minutes) => page.evaluate((ms) => window.move(ms), minutes * 60_000);
  const id = await established(page);
  const snapshots = async (of) => (await h.events(of)).filter((e) => e.type === 2).length;
  for (const minutes of [2, 2]) {
    await move(minutes);
    await page.evaluate(() => document.body.append("."));
  }
  await mark(page, 1);
  await arrived(page, id);
  assert.equal(await snapshots(id), 1);
  await move(1.1);
  await mark(page, 1); // no event of the page's
  await arrived(page, id);
  assert.equal(await snapshots(id), 1, "not while idle");
  await page.evaluate(() => document.body.append("."));
  await until(async () => await snapshots(id) === 2, "a second snapshot");
  await move(29);
  await page.reload();
  assert.equal(await sessionOf(page), id);
  await mark(page, 1);
  await arrived(page, id);
  await move(31);
  await page.reload();
  const next = await sessionOf(page);
  assert.notEqual(next, id);
  page.marks = 0;
  await mark(page, 1);
  await arrived(page, next);

  await until(async () => (await h.json(`/sessions/${next}`)).chunks.length > 0, "the commit");
  await until(() => page.evaluate(() => window.sessionReplay.state.waiting === 0), "the last ack");
  await move(31); // the tab is left, and used again
  await page.click("#p");
  const third = await until(async () => {
    const now = await page.evaluate(() => window.sessionReplay.sessionId);
    return now !== next && now;
  }, "a session of its own");
  page.marks = 0;
  await mark(page, 1);
  const events = await arrived(page, third);
  assert.deepEqual(events.slice(0, 2).map((e) => e.type), [4, 2]);
  assert.ok(events.at(-1).timestamp - events[0].timestamp < 600_000, "without the half hour");
  await playable(events);
  assert.equal((await h.json(`/sessions/${next}`)).isActive, false);
});

test("a page's own Date, and clocks that are set, do not change the times", async (t) => {
  const url = embed("/dates", "<p id=p>dates");
  for (const script of [
    () => { Date.now = () => 1_700_000_000_000; },
    () => { window.Date = class extends Date { constructor() { super(0); } static now() { return 0; } }; },
    () => { performance.now = () => 0; const { now } = Date; Date.now = () => now() + (window.skew ?? 0); },
  ]) {
    const page = await visit(t, url, { script });
    const id = await sessionOf(page);
    const began = Date.now();
    for (const skew of [0, -3_600_000, 50 * 365 * 86_400_000, -86_400_000]) {
      await page.evaluate((ms) => { window.skew = ms; document.getElementById("p").textContent = ms; }, skew);
      await page.mouse.move(20 + Math.random() * 100, 50);
      await mark(page, 1);
    }
    const events = await arrived(page, id), times = events.map((e) => e.timestamp), took = Date.now() - began;
    assert.deepEqual(times, [...times].sort((a, b) => a - b));
    assert.ok(times.at(-1) - times[0] < took + 10_000 && Math.abs(times[0] - began) < 600_000, `${times[0]} to ${times.at(-1)}`);
    for (const e of events) for (const p of e.data.positions ?? []) assert.ok(p.timeOffset <= 0 && p.timeOffset >= -500);
  }
});

test("the time of day is set back between two pages", async (t) => {
  const page = await visit(t, embed("/setback", "<p>set back"), { script: movable });
  await page.evaluate(() => sessionStorage.setItem("moved", 3_600_000));
  await page.reload();
  const id = await established(page);
  await page.evaluate(() => sessionStorage.setItem("moved", 0)); // an hour back
  await page.reload();
  await mark(page, 1);
  const times = (await arrived(page, id)).map((e) => e.timestamp);
  assert.deepEqual(times, [...times].sort((a, b) => a - b));
  assert.ok(times.at(-1) - times[0] < 600_000);
});

test("forms with fields named as DOM properties", async (t) => {
  const page = await visit(t, embed("/forms", file("forms.html")));
  const id = await established(page);
  await page.evaluate(() => {
    for (const form of document.forms) HTMLElement.prototype.setAttribute.call(form, "class", "was-validated");
    for (const form of document.forms) Element.prototype.insertAdjacentHTML.call(form, "beforeend", "<b>added</b>");
    Element.prototype.remove.call(document.forms[6]);
    document.getElementById("late").textContent = "second";
  });
  await until(async () => (await everything()).includes("second"), "the change");
  await until(async () => (await h.events(id)).filter((e) => e.type === 2).length >= 2, "a snapshot that mends");
  await page.evaluate(() => { document.getElementById("late").textContent = "third"; });
  await mark(page, 1);
  const events = await arrived(page, id);
  const text = JSON.stringify(events.findLast((e) => e.type === 2));
  for (const name of ["matches", "tagName", "parentNode", "children", "id", "getAttribute", "ownerDocument", "scrollTop", "closest", "shadowRoot"]) {
    assert.ok(name === "children" || text.includes(`"name":"${name}"`), `${name} is missing`);
  }
  assert.equal(text.match(/"data-replay-left-out":"form"/g).length, 5, "nodeType, attributes twice, host, ELEMENT_NODE");
  assert.ok(text.includes('"style":"color: teal"') && !text.includes('"value":"own"'));
  assert.ok(JSON.stringify(events.find((e) => e.type === 2)).includes('"class":"single"'), "a form's own attributes");
  const state = await page.evaluate(() => window.sessionReplay.state);
  assert.ok(state.recording && state.errors > 0, JSON.stringify(state));
  assert.ok(events.some((e) => e.data.texts?.[0]?.value === "third" || e.data.adds?.[0]?.node.textContent === "third"), "it goes on");
  assert.ok(page.wrong.every((text) => text.startsWith("session-replay:")), "no error is the page's");
});

test("what controls hold is recorded when no event tells", async (t) => {
  const page = await visit(t, embed("/controls", `<form id=f><input id=a><input id=c type=checkbox><select id=s><option value="">none<option value=red>red</select></form>
    <input id=r><p id=p></p>`), { script: () => { // a setter of before the recorder, as frameworks keep it
    window.setValue = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
  } });
  const id = await established(page);
  await page.fill("#a", "something");
  await page.check("#c");
  await page.selectOption("#s", "red");
  await page.fill("#r", "message");
  await mark(page, 1);
  await arrived(page, id);
  await page.evaluate(() => { document.getElementById("f").reset(); window.setValue.call(document.getElementById("r"), ""); document.getElementById("p").textContent = "cleared"; });
  await mark(page, 1);
  await arrived(page, id);
  const last = await until(async () => {
    const inputs = (await h.events(id)).filter((e) => e.type === 3 && e.data.source === 5).map((e) => e.data);
    const byId = Object.values(Object.fromEntries(inputs.map((d) => [d.id, [d.text, d.isChecked]])));
    return inputs.length >= 8 && byId;
  }, "the cleared fields");
  assert.deepEqual(last, [["", false], ["**", false], ["", false], ["", false]]);
  const texts = (await h.events(id)).filter((e) => e.data.source === 5).map((e) => e.data.text);
  assert.ok(texts.includes("********"), "a choice is seen, not which");
});

test("a snapshot larger than a message loses its largest pictures", async (t) => {
  const page = await visit(t, embed("/large", `<h1>Scans</h1><img id=large><img id=small src="data:image/png;base64,${"B".repeat(5000)}">
    <script>large.src = "data:image/png;base64," + "A".repeat(36e6);</script>`));
  const events = await arrived(page, await established(page));
  const text = JSON.stringify(events.find((e) => e.type === 2));
  assert.ok(text.length < 100_000 && text.includes("data:,left-out") && text.includes("BBBBB"));

  await h.restart({ MAX_MESSAGE_BYTES: "300000" }); // the tracker does not know this limit
  t.after(() => h.restart({ MAX_MESSAGE_BYTES: "" }));
  const smaller = await visit(t, embed("/smaller", `<h1>Scans</h1><img src="data:image/png;base64,${"C".repeat(500_000)}">`));
  const id = await sessionOf(smaller);
  const fitting = await until(async () => {
    const all = await h.events(id).catch(() => []);
    return all.some((e) => e.type === 2) && all;
  }, "a snapshot");
  assert.ok(JSON.stringify(fitting).includes("data:,left-out"));

  const hopeless = await visit(t, embed("/hopeless", `<p>${"many words ".repeat(60_000)}`));
  await until(() => hopeless.evaluate(() => /too.large/.test(window.sessionReplay.state.reason)), "the reason");
  const { recording } = await hopeless.evaluate(() => {
    window.sessionReplay.stop();
    window.sessionReplay.start(); // it knows the limit now, at its first snapshot
    return window.sessionReplay.state;
  });
  assert.equal(recording, false);
});

test("what lists show of a session is told without its events", async (t) => {
  embed("/told", "<title>First page</title><button id=b>press</button>");
  const page = await visit(t, `${site}/told`);
  const id = await established(page);
  await page.click("#b");
  await page.click("#b");
  await page.evaluate(() => { history.pushState(null, "", "/told/second"); document.title = "Second page"; });
  const metadata = await until(async () => {
    const { metadata } = await h.json(`/sessions/${id}`);
    return metadata.pages === 2 && metadata;
  }, "the news");
  const { url, title, lastUrl, lastTitle, pages: seen, clicks } = metadata;
  assert.deepEqual({ url, title, lastUrl, lastTitle, seen, clicks },
    { url: `${site}/told`, title: "/told", lastUrl: `${site}/told/second`, lastTitle: "Second page", seen: 2, clicks: 2 });
  const events = await h.events(id);
  assert.deepEqual(customs(events, "navigation").map(({ href }) => href), [`${site}/told/second`]);
  assert.deepEqual(customs(events, "title"), [{ title: "Second page" }]);
  await page.evaluate(() => { document.title = "Third page"; }); // and nothing else happens
  await until(async () => (await h.json(`/sessions/${id}`)).metadata.lastTitle === "Third page", "the third title");
});

test("sessionReplay.state says why nothing is recorded", async (t) => {
  const state = (page) => page.evaluate(() => window.sessionReplay.state);
  const told = [];
  const see = async (path, attributes, script) => {
    const page = await visit(t, null, { script });
    page.on("console", (m) => { if (m.type() === "info" && m.text().startsWith("session-replay:")) told.push(m.text()); });
    await page.goto(embed(path, "<p>state", attributes));
    return page;
  };
  const gpc = () => Object.defineProperty(Navigator.prototype, "globalPrivacyControl", { get: () => true });
  const used = (page) => page.evaluate(() => [sessionStorage.length, localStorage.length]);
  const signalled = await see("/state1", "", gpc);
  assert.deepEqual(await state(signalled), { recording: false, reason: "gpc", transport: "", waiting: 0, errors: 0 });
  assert.deepEqual(await used(signalled), [0, 0]);
  assert.equal((await state(await see("/state2", "data-sample-rate=0"))).reason, "sampled-out");
  const later = await see("/state3", "data-autostart=false");
  assert.deepEqual(await used(later), [0, 0]);
  assert.deepEqual(await state(later), { recording: false, reason: "not-started", transport: "", waiting: 0, errors: 0 });
  assert.deepEqual(told.map((line) => line.split(": ")[1]), ["gpc", "sampled-out", "not-started"]);
  await later.evaluate(() => window.sessionReplay.start());
  await established(later);
  await until(async () => (await state(later)).waiting === 0, "the acks");
  assert.deepEqual(await state(later), { recording: true, reason: "", transport: "websocket", waiting: 0, errors: 0 });
  await later.context().setOffline(true);
  await later.evaluate(() => window.dispatchEvent(new Event("offline")));
  await until(async () => (await state(later)).reason === "offline", "the reason");
  await later.context().setOffline(false);
  await later.evaluate(() => window.sessionReplay.stop());
  assert.equal((await state(later)).reason, "stopped");
  const blocked = await see("/state4", `data-endpoint="http://127.0.0.1:9"`);
  await until(async () => (await state(blocked)).reason === "blocked", "the reason");
});

test("allow-query keeps the query", async (t) => {
  const page = await visit(t, embed("/query", "<a href='/x?page=2'>2</a>", "data-allow-query") + "?page=1");
  const id = await sessionOf(page);
  await mark(page, 1);
  const events = await arrived(page, id);
  assert.equal(events.find((e) => e.type === 4).data.href, `${site}/query?page=1`);
  assert.ok(JSON.stringify(events).includes("/x?page=2"));
});

test("Global Privacy Control, consent, and samples", async (t) => {
  const gpc = () => Object.defineProperty(Navigator.prototype, "globalPrivacyControl", { get: () => true });
  const count = await sessionCount();
  const records = (page) => page.evaluate(() => window.sessionReplay.state.recording || window.sessionReplay.sessionId !== null);

  let page = await visit(t, embed("/gpc", "<p>gpc", "data-gpc=ignore"), { script: gpc });
  await sessionOf(page);

  page = await visit(t, embed("/consent", "<p>consent", "data-autostart=false"));
  assert.equal(await records(page), false);
  await page.evaluate(() => { window.sessionReplay.identify("ann"); window.sessionReplay.start(); });
  const id = await established(page);
  assert.equal((await h.json(`/sessions/${id}`)).userId, "ann");
  await page.evaluate(() => window.sessionReplay.stop());
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the end of the session, before its grace period is over");
  assert.equal(await page.evaluate(() => window.sessionReplay.sessionId), null);
  const events = (await h.events(id)).length;
  await page.evaluate(() => { document.body.append("after the end"); });
  await page.evaluate(() => window.sessionReplay.start());
  page.marks = 0;
  assert.notEqual(await established(page), id);
  assert.equal((await h.events(id)).length, events);

  page = await visit(t, embed("/all", "<p>all", "data-sample-rate=1 data-visitor=off"));
  await sessionOf(page);
  assert.equal(await page.evaluate(() => localStorage.length), 0, "no visitor id");
  for (const [lot, recorded] of [[0.4, true], [0.6, false]]) { // a tab keeps its lot
    page = await visit(t, embed("/some", "<p>some", "data-sample-rate=0.5"), { script: `Math.random = () => ${lot}` });
    assert.equal(await records(page), recorded);
    if (recorded) await established(page);
    await page.addInitScript(`Math.random = () => ${1 - lot}`);
    await page.reload();
    assert.equal(await records(page), recorded);
  }
  assert.ok(await sessionCount() >= count + 4);
});

test("a malformed selector records nothing rather than too much", async (t) => {
  const page = await visit(t, embed("/malformed", "<p>x", 'data-block-selector="div["'));
  const { reason } = await page.evaluate(() => window.sessionReplay.state);
  assert.equal(reason, "failed");
  assert.match(page.wrong.join(), /selector/);
});

test("errors, identify, and a page's own navigation", async (t) => {
  const page = await visit(t, embed("/errors", "<p>errors", "data-user=ann"));
  const id = await established(page);
  await page.evaluate(() => {
    setTimeout(() => { throw new TypeError("first"); });
    Promise.reject(new Error("second"));
    Promise.reject("third");
    window.sessionReplay.identify("bob", { plan: "large" });
    window.sessionReplay.event("loop", (() => { const a = {}; a.a = a; return a; })()); // cannot be serialized
    history.pushState(null, "", "/errors/two?x=1");
    history.replaceState(null, "", "/errors/two?x=2");
    location.hash = "/three";
    location.hash = "no-section";
  });
  await until(async () => (await h.json(`/sessions/${id}`)).errorCount === 3, "three errors");
  const errors = await until(async () => {
    const { errors } = await h.json(`/sessions/${id}/errors`);
    return errors.length === 3 && errors;
  }, "their storage");
  const found = errors.map((e) => [e.kind, e.data.message ?? e.data.reason]).sort();
  assert.deepEqual(found, [["javascript_error", "Uncaught TypeError: first"], ["promise_rejection", "second"], ["promise_rejection", "third"]]);
  assert.match(errors.find((e) => e.kind === "javascript_error").data.stack, /TypeError: first\n/);
  await mark(page, 1);
  const events = await arrived(page, id);
  assert.deepEqual(customs(events, "navigation").map((n) => n.href.slice(site.length)), ["/errors/two", "/errors/two#/three", "/errors/two"]);
  const about = await until(async () => {
    const session = await h.json(`/sessions/${id}`);
    return session.userId === "bob" && session;
  }, "the user's new name");
  assert.deepEqual(about.metadata.traits, { plan: "large" });
});

test("traits that JSON cannot hold change nothing", async (t) => {
  const page = await visit(t, embed("/traits", "<p>traits", "data-user=ann"));
  const id = await established(page);
  await page.evaluate(() => {
    const circular = {};
    circular.self = circular;
    window.sessionReplay.identify("bob", { plan: "small", circular });
    window.sessionReplay.identify("bob", { plan: "small", number: 10n });
  });
  assert.equal(page.wrong.length, 2);
  await mark(page, 3);
  const reconnected = page.waitForEvent("websocket");
  await page.evaluate(() => window.dispatchEvent(new Event("offline")));
  await reconnected;
  await mark(page, 3);
  await arrived(page, id);
  const { userId, metadata } = await h.json(`/sessions/${id}`);
  assert.deepEqual([userId, metadata.traits ?? {}], ["ann", {}]);

  const later = await visit(t, embed("/traits2", "<p>traits", "data-autostart=false"));
  await later.evaluate(() => { window.sessionReplay.identify("bob", { number: 10n }); window.sessionReplay.start({ traits: { number: 10n } }); });
  assert.deepEqual([later.wrong.length, await later.evaluate(() => window.sessionReplay.sessionId ?? null)], [2, null], "start() says so too");
  await later.evaluate(() => window.sessionReplay.start({ traits: { number: 10 } }));
  await established(later);
});

test("what the server may say", async (t) => {
  const page = await visit(t);
  let wire;
  await page.routeWebSocket(/\/ws/, (ws) => { wire = ws; ws.connectToServer(); });
  const say = (type, data) => wire.send(JSON.stringify({ type, data }));
  await page.goto(embed("/said", "<p>said"));
  const id = await established(page);
  const snapshots = async (of) => (await h.events(of)).filter((e) => e.type === 2).length;

  say("take_snapshot", { sessionId: id });
  await until(async () => await snapshots(id) === 2, "a snapshot");
  say("nonsense", {});
  say("error", { code: "invalid_message", message: "this is a test" });
  assert.equal(await page.evaluate(() => window.sessionReplay.sessionId), id);

  say("error", { code: "sequence_gap", expected: 1 }); // the tracker connects anew
  const before = wire;
  await mark(page, 5);
  await until(() => wire !== before, "a new connection");
  await playable(await arrived(page, id));

  say("error", { code: "not_stored" });
  const next = await until(async () => {
    const now = await page.evaluate(() => window.sessionReplay.sessionId);
    return now !== id && now;
  }, "another session");
  page.marks = 0;
  await mark(page, 5);
  const events = await arrived(page, next);
  assert.deepEqual(events.slice(0, 2).map((e) => e.type), [4, 2]);
  await playable(events);

  const stopped = () => until(() => page.evaluate(() => window.sessionReplay.sessionId === null), "the end of recording");
  say("error", { code: "session_full" });
  await stopped();
  await page.reload();
  page.marks = 0;
  const third = await established(page);
  assert.notEqual(third, next);
  wire.close({ code: 4001, reason: "taken over" });
  await stopped();
  await mark(page, 1); // into the void
  await page.reload();
  page.marks = 0;
  assert.notEqual(await established(page), third);
  wire.close({ code: 4004, reason: "deleted" });
  await stopped();
});

test("a deleted session stops, and the next page begins another", async (t) => {
  const page = await visit(t, embed("/deleted", "<p>deleted"));
  const id = await established(page);
  assert.equal((await fetch(`${h.url}/sessions/${id}`, { method: "DELETE" })).status, 204);
  await until(() => page.evaluate(() => window.sessionReplay.sessionId === null), "the end of recording");
  await page.reload();
  const next = await sessionOf(page);
  assert.notEqual(next, id);
  page.marks = 0;
  await mark(page, 1);
  await playable(await arrived(page, next));
});

test("a session that the server does not know any more becomes another, whole", async (t) => {
  const page = await visit(t, embed("/unknown", "<p id=p>unknown"));
  const id = await established(page);
  await h.kill();
  await h.sql(`delete from session_events where session_id = '${id}'; delete from session_errors where session_id = '${id}'; delete from sessions where session_id = '${id}'`);
  await page.evaluate(() => { document.getElementById("p").textContent = "known again"; });
  await h.start();
  const next = await until(async () => {
    const now = await page.evaluate(() => window.sessionReplay.sessionId);
    return now !== id && now;
  }, "another session");
  page.marks = 0;
  await mark(page, 3);
  const events = await arrived(page, next);
  assert.deepEqual(events.slice(0, 2).map((e) => e.type), [4, 2]);
  assert.match(await playable(events), /known again/);
});

test("back from the back/forward cache", async (t) => {
  const page = await visit(t, embed("/frozen", "<p id=p>frozen"));
  const id = await established(page);
  await page.evaluate(() => { window.here = true; });
  await page.goto(embed("/other", "<p>other"));
  await mark(page, 3);
  await page.goBack({ waitUntil: "commit" });
  const cached = await page.evaluate(() => window.here === true);
  t.diagnostic(`the page ${cached ? "came" : "did not come"} from the back/forward cache`);
  await page.waitForSelector("#p");
  await page.evaluate(() => { document.getElementById("p").textContent = "thawed"; });
  await mark(page, 3);
  assert.equal(await sessionOf(page), id);
  assert.match(await playable(await arrived(page, id)), /thawed/);
  assert.deepEqual(page.wrong, []);
});

test("a page with a module loader, replaced globals and Prototype's toJSON", async (t) => {
  pages["/hostile"] = `<!doctype html><script>
    window.defined = [];
    window.define = (...args) => { window.defined.push(args); };
    window.define.amd = {};
    window.exports = {}; window.module = { exports: {} };
    Array.prototype.toJSON = function () { return "[broken]"; };
    String.prototype.toJSON = function () { return "'" + this + "'"; };
    window.handled = [];
    window.onerror = (message) => { window.handled.push(message); return true; };
    window.onunhandledrejection = () => false;
    window.navigation = {};
    window.addEventListener = () => {}; // this page listens to nothing
  </script><script src="${h.url}/tracker.js"></script><script>
    JSON.stringify = () => "{}";
    window.WebSocket = undefined;
    window.insert = () => {
      const sheet = document.head.appendChild(document.createElement("style")).sheet;
      try { sheet.insertRule("{"); return "nothing"; } catch (e) { return e.name; }
    };
    Promise.resolve().then(() => { throw new Error("rejected"); });
    throw new Error("thrown");
  </script><p>hostile<img name=hidden><img name=referrer>`;
  const page = await visit(t, `${site}/hostile`);
  const id = await sessionOf(page);
  await until(async () => (await h.json(`/sessions/${id}`).catch(() => ({}))).errorCount === 2, "two errors");
  const events = await until(async () => { const all = await h.events(id).catch(() => []); return all.some((e) => e.type === 2) && all; }, "a snapshot");
  assert.match(await playable(events), /hostile/);
  assert.deepEqual(await page.evaluate(() => [window.defined.length, Object.keys(window.exports), Object.keys(window.module.exports),
    window.insert(), window.handled, typeof window.rrwebRecord, Object.hasOwn(Array.prototype, "toJSON")]),
  [0, [], [], "SyntaxError", ["Uncaught Error: thrown"], "undefined", true]);
  await page.evaluate(() => { window.dispatchEvent(new Event("offline")); document.body.append("still going"); });
  await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
  await until(async () => customs(await h.events(id), "visibility").some(({ hidden }) => hidden === false), "what the tab is");
  await until(async () => (await everything()).includes("still going"), "what follows, over a new connection");
  assert.deepEqual(page.wrong, []);
});

test("an insecure origin, without Web Locks", async (t) => {
  const url = embed("/insecure", "<p>insecure").replace("127.0.0.1", "insecure.test");
  const page = await visit(t, url);
  assert.equal(await page.evaluate(() => isSecureContext), false);
  const id = await established(page);
  await page.reload();
  await mark(page, 5);
  await arrived(page, id);
  assert.deepEqual(page.wrong, []);
});

test("a frame inside a recorded page is in that page's recording", async (t) => {
  const inner = embed("/inner", "<p>inside</p>");
  const page = await visit(t, embed("/outer", `<p>outside</p><iframe src="${inner}"></iframe>`));
  const id = await sessionOf(page);
  const frame = page.frames().find((f) => f.url() === inner);
  await until(() => frame.evaluate(() => window.sessionReplay?.state.reason.startsWith("recorded by")), "the reason");
  const events = await until(async () => { const all = await h.events(id).catch(() => []); return JSON.stringify(all).includes("inside") && all; }, "the frame's text");
  await playable(events);
});

test("a frame inside a page that does not record is recorded; one in a frame of one that does is not", async (t) => {
  const inner = embed("/alone", "<p>alone</p>"), frame = `<iframe src="${inner}"></iframe>`;
  const page = await visit(t, embed("/silent", frame, "data-autostart=false"));
  const innerOf = (p) => p.frames().find((f) => f.url() === inner);
  await sessionOf(innerOf(page));
  pages["/between"] = frame;
  const recorded = await visit(t, embed("/around", `<iframe src="${site}/between"></iframe>`));
  await until(() => innerOf(recorded).evaluate(() => window.sessionReplay.state.reason.startsWith("recorded by")), "the reason");
});

test("after stop() nothing is looked at any more", async (t) => {
  const page = await visit(t, embed("/letgo", "<canvas id=c></canvas>"));
  await established(page);
  const looks = await page.evaluate(async () => {
    let looks = 0;
    window.sessionReplay.stop();
    document.querySelectorAll = () => { looks++; return []; };
    document.getElementById("c").width = 500;
    await new Promise((done) => setTimeout(done, 2000));
    return looks;
  });
  assert.equal(looks, 0);
});

test("a page where nothing happens is looked at no more", async (t) => {
  const script = () => { // time is ten times as fast
    const { setTimeout } = window;
    window.ran = 0;
    window.setTimeout = (f, ms) => setTimeout(() => { window.ran++; f(); }, ms / 10);
  };
  const page = await visit(t, embed("/resting", "<p>resting"), { script });
  await established(page);
  const ran = () => page.evaluate(() => window.ran);
  assert.ok(await ran() > 0);
  await until(async () => {
    const before = await ran();
    await sleep(4000);
    return await ran() === before;
  }, "rest");
});

test("the server's key", async (t) => {
  await h.restart({ INGEST_KEY: "write-only" });
  t.after(() => h.restart({ INGEST_KEY: "" }));
  const wrong = await visit(t, embed("/nokey", "<p>nokey"));
  const id = await sessionOf(wrong);
  const page = await visit(t, embed("/key", "<p>key", "data-key=write-only"));
  await mark(page, 1);
  await arrived(page, await sessionOf(page));
  assert.equal((await fetch(`${h.url}/sessions/${id}`)).status, 404);
});

test("an older browser reads the script, and is left alone", async (t) => {
  const script = () => {
    const { addEventListener } = EventTarget.prototype;
    EventTarget.prototype.addEventListener = function (type, f, { capture } = {}) { addEventListener.call(this, type, f, { capture }); };
  };
  const page = await visit(t, embed("/older", "<p>older"), { script });
  assert.equal(await page.evaluate(() => window.sessionReplay), undefined);
  assert.deepEqual(page.wrong, []);
  const ours = readdirSync(new URL("..", import.meta.url)).filter((name) => name.startsWith("tracker"))
    .map((name) => readFileSync(new URL(`../${name}`, import.meta.url), "utf8"));
  assert.equal(ours.length, 6);
  const newer = /\?\?|\|\|=|&&=|\?\.[\w[(]|\(\?<[!=]|\d_\d/; // than 2019
  assert.doesNotMatch(ours.join(), newer);
});

test("what happens in a frame is recorded once, however many snapshots there are", async (t) => {
  const page = await visit(t, embed("/framed", `<iframe id=f srcdoc="<p id=inner>in</p>"></iframe>`), { script: movable });
  const id = await established(page), inner = page.frameLocator("#f").locator("#inner");
  const act = async (title) => {
    await inner.evaluate((el, title) => el.setAttribute("title", title), title);
    await inner.click();
  };
  for (let n = 2; n < 5; n++) {
    await page.evaluate(() => { window.move(6 * 60_000); document.body.append("a snapshot is due"); });
    await until(async () => (await h.events(id)).filter((e) => e.type === 2).length === n, "a snapshot");
  }
  await act("first");
  await page.evaluate(() => {
    const { contentDocument: doc } = document.getElementById("f");
    doc.open();
    doc.write("<p id=inner>written anew</p>");
    doc.close();
  });
  await until(() => inner.textContent().then((text) => text === "written anew"), "the new text");
  const isTakenIn = (e) => e.data.isAttachIframe && JSON.stringify(e).includes("written anew");
  await until(async () => (await h.events(id)).some(isTakenIn), "rrweb to take the document in");
  await act("second");
  await mark(page, 1);
  const events = await arrived(page, id), times = (what) => events.filter((e) => JSON.stringify(e).includes(what)).length;
  assert.deepEqual([times('"first"'), events.filter(({ data }) => data.source === 2 && data.type === 2).length], [1, 2]);
  assert.ok(times('"second"') > 0); // rrweb's first observer of changes is still there
});

test("the script is small, compressed and cacheable", async (t) => {
  const answer = await fetch(`${h.url}/tracker.js`);
  const body = Buffer.from(await answer.arrayBuffer());
  const size = gzipSync(body, { level: 9 }).length;
  t.diagnostic(`/tracker.js: ${body.length} bytes, ${size} with gzip -9`);
  assert.ok(size <= 43_000, `${size} bytes`); // other zlibs may make a little more
  assert.equal(answer.headers.get("content-encoding"), "gzip");
  assert.match(answer.headers.get("cache-control"), /public, max-age=3600/);
  assert.equal((await fetch(`${h.url}/tracker.js`, { headers: { "If-None-Match": answer.headers.get("etag") } })).status, 304);
});

test("what recording costs the demo page", async (t) => {
  const page = await visit(t, `${h.url}/demo`);
  await established(page);
  const cdp = await page.context().newCDPSession(page);
  await cdp.send("Profiler.enable");
  const interval = 200; // microseconds
  await cdp.send("Profiler.setSamplingInterval", { interval });

  // measure gives the milliseconds a second that the profiler saw in tracker.js. Where a
  // sample is late, the processor was busy with something else.
  async function measure(act) {
    const began = Date.now();
    await cdp.send("Profiler.start");
    await act();
    const { profile } = await cdp.send("Profiler.stop");
    const inTracker = new Set();
    const walk = (node, inside) => { // what the recorder calls counts as the recorder's
      const here = inside || node.callFrame.url.endsWith("/tracker.js");
      if (here) inTracker.add(node.id);
      for (const id of node.children ?? []) walk(byId.get(id), here);
    };
    const byId = new Map(profile.nodes.map((node) => [node.id, node]));
    walk(profile.nodes[0], false);
    const spent = profile.samples.reduce((sum, id, i) => sum + (inTracker.has(id) ? Math.min(profile.timeDeltas[i], 2 * interval) : 0), 0) / 1000;
    return spent / ((Date.now() - began) / 1000);
  }

  const idle = await measure(() => sleep(3000));
  const busy = await measure(async () => {
    for (let i = 0; i < 6; i++) {
      await page.click(`text=Add >> nth=${i}`);
      await page.mouse.move(100 + 50 * i, 300, { steps: 20 });
      await page.locator("[name=name]").pressSequentially("Somebody ");
      await page.mouse.wheel(0, i % 2 ? -200 : 200);
    }
  });
  // The bounds have room for slower processors: 1 and 40 are usual.
  t.diagnostic(`time in tracker.js: idle ${idle.toFixed(2)} ms a second, busy ${busy.toFixed(1)} ms a second`);
  assert.ok(idle < 10, `${idle} ms a second on an idle page`);
  assert.ok(busy < 200, `${busy} ms a second on a busy page`);
});
