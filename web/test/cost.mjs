// What recording costs a visitor: prints a table of the same visit without a
// recorder, with rrweb alone, with rrweb whose events become text, and with
// tracker.js. A table of 1,000 rows is made, changed twenty times, 1,000 more are
// added, some selected, moved, removed, then 10,000 made; then typing and mouse.
//
//   node web/test/cost.mjs        medians of ROUNDS=3
import { readFileSync } from "node:fs";
import { get } from "node:http";
import { connect, createServer } from "node:net";
import { gzipSync } from "node:zlib";
import { harness, sleep, until } from "./harness.mjs";

const IDLE_MS = 5000;
const rounds = Number(process.env.ROUNDS ?? 3);
const rrweb = readFileSync(new URL("../dist/rrweb-record.js", import.meta.url));

// shop is the page's own script.
function shop() {
  const body = document.querySelector("tbody"), words = ["pretty", "large", "plain", "quaint", "clean", "helpful", "mushy", "odd"];
  let n = 0;
  const row = () => {
    const tr = document.createElement("tr");
    tr.innerHTML = `<td class="id">${++n}</td><td class="name"><a>${words[n % 8]} ${words[(n * 5) % 7]} table ${n}</a></td>`
      + '<td class="remove"><a><span class="icon" aria-hidden="true"></span></a></td><td class="rest"></td>';
    return tr;
  };
  const add = (count) => { for (let i = 0; i < count; i++) body.append(row()); };
  const make = (count) => { body.textContent = ""; add(count); };
  const change = () => { for (let i = 0; i < body.rows.length; i += 10) body.rows[i].querySelector("a").textContent += " !!!"; };
  const select = (i) => {
    body.querySelector(".chosen")?.classList.remove("chosen");
    body.rows[i].classList.add("chosen");
  };
  const swap = () => { body.insertBefore(body.rows[998], body.rows[1]); body.insertBefore(body.rows[2], body.rows[998]); };
  const all = (f, ...list) => list.map((x) => () => f(x));
  window.steps = [() => make(1000), ...Array(20).fill(change), () => add(1000), ...all(select, 3, 90, 7, 500, 11), ...Array(5).fill(swap),
    ...all((i) => body.rows[i].remove(), 5, 50, 6, 600, 7), () => make(10_000)];
}

const recorders = {
  "no recorder": () => "",
  "rrweb alone, events thrown away": () => '<script src="/rrweb.js"></script><script>rrwebRecord.record({ emit() {} })</script>',
  "rrweb, JSON.stringify of each event": () =>
    '<script src="/rrweb.js"></script><script>rrwebRecord.record({ emit(event) { window.last = JSON.stringify(event).length; } })</script>',
  "tracker.js": (url) => `<script src="${url}/tracker.js" async></script>`,
};

// proxy counts what goes to the server.
async function proxy(port) {
  const counted = { bytes: 0 };
  const server = createServer((from) => {
    const to = connect(port, "127.0.0.1");
    from.on("data", (d) => { counted.bytes += d.length; });
    from.pipe(to).pipe(from);
    for (const [one, other] of [[from, to], [to, from]]) one.on("error", () => other.destroy());
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  return Object.assign(counted, { url: `http://127.0.0.1:${server.address().port}`, close: () => server.close() });
}

// tab opens a page without Playwright, which would have each message of a WebSocket
// copied for it, on the page's main thread, and that would be counted as the tracker's.
async function tab(browser) {
  const cdp = await browser.newBrowserCDPSession(), waiting = new Map();
  const { targetId } = await cdp.send("Target.createTarget", { url: "about:blank", width: 1280, height: 800 });
  const { sessionId } = await cdp.send("Target.attachToTarget", { targetId });
  cdp.on("Target.receivedMessageFromTarget", ({ message }) => {
    const { id, result, error } = JSON.parse(message);
    waiting.get(id)?.(error ? Promise.reject(new Error(error.message)) : result);
  });
  const send = (method, params = {}) => new Promise((done) => {
    const id = waiting.size + 1;
    waiting.set(id, done);
    cdp.send("Target.sendMessageToTarget", { sessionId, message: JSON.stringify({ id, method, params }) });
  });
  const evaluate = async (expression) => {
    const { result, exceptionDetails } = await send("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  };
  await send("Performance.enable", { timeDomain: "threadTicks" }); // CPU time: other programs do not count
  const metric = async (name) => (await send("Performance.getMetrics")).metrics.find((m) => m.name === name).value;
  return { send, evaluate, metric };
}

// visit is one visit in a new browser. With look it has parts, by the profiler's samples.
async function visit(h, url, way, look) {
  const browser = await h.launch(), { send, evaluate, metric } = await tab(browser);
  const before = way.bytes;
  await send("Page.navigate", { url });
  await until(() => evaluate("document.readyState === 'complete'"), "the page");
  await settled(evaluate);
  if (look) await startProfile(send);
  for (let i = 0, n = await evaluate("steps.length"); i < n; i++) {
    await evaluate(`new Promise((done) => { steps[${i}](); requestAnimationFrame(() => setTimeout(done, 50)); })`);
  }
  await evaluate("document.querySelector('input').focus()");
  for (const text of "forty letters are typed into this field.") {
    await send("Input.dispatchKeyEvent", { type: "keyDown", key: text, text });
    await send("Input.dispatchKeyEvent", { type: "keyUp", key: text });
    await sleep(20);
  }
  for (let i = 0; i < 50; i++) await send("Input.dispatchMouseEvent", { type: "mouseMoved", x: 50 + 10 * i, y: 50 + 5 * i });
  await settled(evaluate);
  const parts = look && partsOf((await send("Profiler.stop")).profile);
  const thread = 1000 * await metric("TaskDuration"), sent = way.bytes - before;
  await sleep(IDLE_MS);
  const idle = 1000 * await metric("TaskDuration") - thread, idleSent = way.bytes - before - sent;
  await send("HeapProfiler.collectGarbage");
  const heap = await metric("JSHeapUsedSize");
  await browser.close();
  return { thread, sent, heap, idle, idleSent, parts };
}

// settled waits until the page's recorder, if any, has sent all it has.
async function settled(evaluate) {
  await until(() => evaluate(`!document.querySelector('script[src*="tracker.js"]')
    || !!window.sessionReplay && sessionReplay.state.recording && sessionReplay.state.waiting === 0`), "everything is acked");
  await sleep(1000);
}

async function startProfile(send) {
  await send("Profiler.enable");
  await send("Profiler.setSamplingInterval", { interval: 1000 });
  await send("Profiler.start");
}

// partsOf gives the ms that went into rrweb, into making text, and into what is
// tracker.js's own; and these of the task that has most of its own. A sample belongs
// to the innermost function with an address; rrweb stands first in the file. (The
// childNodes that the tracker puts before the browser's are asked for by rrweb.) A
// task ends where the thread is idle.
function partsOf({ nodes, samples, timeDeltas }) {
  const byId = new Map(nodes.map((n) => [n.id, n]));
  for (const n of nodes) for (const child of n.children ?? []) byId.get(child).parent = n;
  const recorderEnds = rrweb.toString().split("\n").length;
  const partOf = (n) => {
    if (n.callFrame.functionName === "get childNodes") return "rrweb";
    while (n && !n.callFrame.url) n = n.parent;
    if (!n?.callFrame.url.endsWith("/tracker.js")) return "page";
    return n.callFrame.lineNumber < recorderEnds ? "rrweb" : n.callFrame.functionName === "toText" ? "text" : "own";
  };
  const none = () => ({ rrweb: 0, text: 0, own: 0, page: 0 }), all = none();
  let task = none(), most = task;
  samples.forEach((id, i) => {
    const n = byId.get(id);
    if (["(idle)", "(program)"].includes(n.callFrame.functionName)) return void (task = none());
    for (const sum of [all, task]) sum[partOf(n)] += (timeDeltas[i + 1] ?? 0) / 1000;
    if (task.own > most.own) most = task;
  });
  return { all, most };
}

const packed = (url) => new Promise((done) => {
  get(`${url}/tracker.js`, { headers: { "Accept-Encoding": "gzip" } }, (answer) => {
    let size = 0;
    answer.on("data", (d) => { size += d.length; }).on("end", () => done(size));
  });
});

const h = await harness();
const way = await proxy(new URL(h.url).port);
try {
  const head = '<!doctype html><meta charset="utf-8"><title>Cost</title>';
  const rest = `<input><table><tbody></tbody></table><script>(${shop})()</script>`;
  const names = Object.keys(recorders), pages = { "/rrweb.js": { type: "text/javascript", body: rrweb } };
  names.forEach((name, i) => { pages[`/${i}`] = head + recorders[name](way.url) + rest; });
  const site = await h.site(pages), runs = names.map(() => []);
  for (let round = 0; round < rounds; round++) {
    for (const i of names.keys()) runs[i].push(await visit(h, `${site}/${i}`, way));
  }
  const median = (i, key) => runs[i].map((r) => r[key]).sort((a, b) => a - b)[rounds >> 1];
  const sizes = [0, gzipSync(rrweb).length, gzipSync(rrweb).length, await packed(way.url)];
  const base = median(0, "thread");
  console.log("\n| recorder | sent | main thread, more than without | heap | script, gzipped | idle, in 5 s |\n|---|---|---|---|---|---|");
  names.forEach((name, i) => console.log(`| ${name} | ${(median(i, "sent") / 1e6).toFixed(2)} MB | ${i ? Math.round(median(i, "thread") - base)
    : `(${Math.round(base)})`} ms | ${(median(i, "heap") / 1e6).toFixed(0)} MB | ${(sizes[i] / 1000).toFixed(0)} KB | ${
    median(i, "idle").toFixed(0)} ms, ${median(i, "idleSent")} bytes |`));
  const added = 100 * (median(3, "thread") - median(2, "thread")) / (median(2, "thread") - base);
  const { all, most } = (await visit(h, `${site}/3`, way, true)).parts;
  const share = ({ rrweb, text, own }) => `${own.toFixed(0)} ms beside ${rrweb.toFixed(0)} ms of rrweb and ${text.toFixed(0)} ms of making text, ${
    (100 * own / (rrweb + text)).toFixed(0)} %`;
  console.log(`\nOn the main thread tracker.js adds ${added.toFixed(0)} % to rrweb with JSON.stringify (target: 10), as the difference of these rows.
By the profiler's samples of one visit it adds ${share(all)};
in the task that has most of it ${share(most)} (target: 50 ms, but for a full snapshot).
Targets for the rest: 1.05 MB, 65 MB, nothing while idle.`);
} finally {
  way.close();
  await h.close();
}
