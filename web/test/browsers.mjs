// Recording and replay in engines other than Chromium's: Firefox, by WebDriver
// BiDi, and WebKitGTK's MiniBrowser, by WebDriver. `make test-browsers` runs this
// with a display, a D-Bus session, and Node's own WebSocket.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { freePort, harness, until } from "./harness.mjs";

// ── The browsers ─────────────────────────────────────────────────────────────
// Each gives {version, open(), end()}; open() gives a tab: go(url), act(WebDriver's
// actions), run(function, ...arguments), errors() of its console, close().

const expression = (f, given) => `JSON.stringify((${f})(...${JSON.stringify(given)}) ?? null)`;

function launch(command, ...args) {
  const child = spawn(command, args, { stdio: ["ignore", "ignore", "pipe"] });
  const kill = () => child.kill();
  process.on("exit", kill);
  child.ended = new Promise((done) => child.on("exit", done)).then(() => process.off("exit", kill));
  return child;
}

async function firefox() {
  const profile = mkdtempSync(join(tmpdir(), "session-replay-firefox-"));
  const child = launch("firefox-esr", "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0");
  let said = "";
  child.stderr.on("data", (data) => { said += data; });
  const [, address] = await until(() => /BiDi listening on (\S+)/.exec(said), "Firefox to start");
  const socket = new WebSocket(`${address}/session`), answers = [], errors = [];
  await new Promise((opened) => { socket.onopen = opened; });
  socket.onmessage = ({ data }) => {
    const { id, method, params, ...answer } = JSON.parse(data);
    if (method === "log.entryAdded" && params.level === "error") errors.push(params.text);
    answers[id]?.(answer);
  };
  const call = (method, params) => new Promise((done, failed) => {
    const id = answers.push(({ result, message }) => (result ? done(result) : failed(new Error(`${method}: ${message}`)))) - 1;
    socket.send(JSON.stringify({ id, method, params }));
  });
  const { capabilities } = await call("session.new", { capabilities: {} });
  await call("session.subscribe", { events: ["log.entryAdded"] });

  const open = async () => {
    const { context } = await call("browsingContext.create", { type: "tab" });
    return {
      go: (url) => call("browsingContext.navigate", { context, url, wait: "complete" }),
      act: (actions) => call("input.performActions", { context, actions }),
      run: async (f, ...given) => {
        const { result, exceptionDetails } = await call("script.evaluate",
          { expression: expression(f, given), target: { context }, awaitPromise: false });
        if (exceptionDetails) throw new Error(exceptionDetails.text);
        return JSON.parse(result.value);
      },
      errors: async () => errors.splice(0),
      close: () => call("browsingContext.close", { context }),
    };
  };
  const end = async () => {
    await call("browser.close", {});
    await child.ended;
    rmSync(profile, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
  };
  return { version: `Firefox ${capabilities.browserVersion}`, open, end };
}

async function webkit() {
  const port = await freePort();
  const child = launch("WebKitWebDriver", `--port=${port}`);
  const call = async (method, path, body) => {
    const answer = await fetch(`http://127.0.0.1:${port}${path}`, { method, body: body && JSON.stringify(body) });
    const { value } = await answer.json();
    if (!answer.ok) throw new Error(`${method} ${path}: ${value.error} ${value.message}`);
    return value;
  };
  await until(() => call("GET", "/status").catch(() => null), "WebKitWebDriver to start");
  const { sessionId, capabilities } = await call("POST", "/session", { capabilities: {} });
  const here = (method, path, body) => call(method, `/session/${sessionId}${path}`, body);
  const [first] = await here("GET", "/window/handles");

  const open = async () => {
    const { handle } = await here("POST", "/window/new", { type: "window" }); // a tab would be hidden
    await here("POST", "/window", { handle });
    const run = async (f, ...given) => JSON.parse(await here("POST", "/execute/sync", { script: `return ${expression(f, given)}`, args: [] }));
    return {
      run,
      go: async (url) => {
        await here("POST", "/url", { url });
        await run(gatherErrors);
      },
      act: (actions) => here("POST", "/actions", { actions }),
      errors: () => run(() => window.wrong),
      close: async () => {
        await here("DELETE", "/window");
        await here("POST", "/window", { handle: first });
      },
    };
  };
  const end = async () => {
    await here("DELETE", "");
    child.kill();
    await child.ended;
  };
  return { version: `WebKitGTK ${capabilities.browserVersion}`, open, end };
}

// gatherErrors runs in pages: WebKitGTK shows no console of a page that is
// automated. Pages of the site begin with it; others have loaded by then.
function gatherErrors() {
  if (window.wrong) return;
  window.wrong = [];
  addEventListener("error", (e) => window.wrong.push(e.message));
  addEventListener("unhandledrejection", (e) => window.wrong.push(String(e.reason)));
  console.error = (...what) => window.wrong.push(what.join(" "));
}

async function click(tab, id) {
  const at = await tab.run((id) => {
    const { x, y, width, height } = document.getElementById(id).getBoundingClientRect();
    return { x: Math.round(x + width / 2), y: Math.round(y + height / 2) };
  }, id);
  await tab.act([{ type: "pointer", id: "mouse", actions: [{ type: "pointerMove", ...at },
    { type: "pointerDown", button: 0 }, { type: "pointerUp", button: 0 }] }]);
}

const type = (tab, text) => tab.act([{ type: "key", id: "keys",
  actions: [...text].flatMap((value) => [{ type: "keyDown", value }, { type: "keyUp", value }]) }]);

// ── The visits ───────────────────────────────────────────────────────────────

const SECRET = "correct horse", MASK = "*".repeat(SECRET.length);
const LEAVING = { closed: "stay", reloaded: "reload", "same origin": "near", "another origin": "far", back: "back" }; // by a click on
const pages = {};
let h, site, elsewhere;

before(async () => {
  h = await harness();
  elsewhere = await h.site({ "/": "<!doctype html><title>elsewhere</title>", "/favicon.ico": "" });
  site = await h.site(pages);
});
after(() => h?.close());

// page repeats what is typed, and says what was clicked on.
const page = (user) => `<!doctype html><meta charset="utf-8"><title>shop</title><script>(${gatherErrors})()</script>
  <script async src="${h.url}/tracker.js" data-user="${user}"></script>
  <input id="field" autocomplete="off"><p id="typed"></p><p id="clicked"></p>
  <button id="stay">stay</button> <button id="reload">reload</button> <button id="back">back</button>
  <a id="near" href="/next">near</a> <a id="far" href="${elsewhere}">far</a>
  <script>
    const $ = (id) => document.getElementById(id);
    $("field").oninput = (e) => { $("typed").textContent = e.target.value; };
    document.onclick = (e) => { $("clicked").textContent = e.target.id; };
    $("reload").onclick = () => location.reload();
    $("back").onclick = () => history.back();
  </script>`;

// happened tells of a recording: snapshot, click ID, typed TEXT.
function happened(events) {
  let ids = {};
  const learn = (node) => {
    ids[node.id] = node.attributes?.id;
    node.childNodes?.forEach(learn);
  };
  return events.flatMap(({ type, data }) => {
    if (type === 2) {
      ids = {};
      learn(data.node);
      return "snapshot";
    }
    if (type === 3 && data.source === 2 && data.type === 2) return `click ${ids[data.id]}`;
    return type === 3 && data.source === 5 ? `typed ${data.text}` : [];
  });
}

// stored waits until something is stored at or after a place in the recording, and
// gives all that has happened by then.
const stored = (session, what, from = 0) => until(async () => {
  const all = happened(await h.events(session).catch(() => []));
  return all.indexOf(what, from) >= 0 && all;
}, `"${what}" of ${session} to be stored`, 30_000);

async function visit(browser, user, way) {
  const tab = await browser.open();
  await tab.go(`${site}/`);
  const session = await until(() => tab.run(() => window.sessionReplay?.sessionId), "a session");
  await stored(session, "snapshot");
  if (way === "back") {
    await click(tab, "near");
    await stored(session, "snapshot", (await stored(session, "click near")).indexOf("click near"));
  }
  await click(tab, "field");
  await type(tab, SECRET);
  const clicked = click(tab, LEAVING[way]).catch(() => {}); // a page that is being left may not answer
  if (way === "closed") await clicked.then(tab.close);
  const before = await stored(session, `click ${LEAVING[way]}`);
  assert.equal(before.findLast((what) => what.startsWith("typed")), `typed ${MASK}`);
  if (way === "closed") return session;
  if (way === "another origin") await tab.run(() => history.back());
  await stored(session, "snapshot", before.lastIndexOf(`click ${LEAVING[way]}`));
  await click(tab, "stay");
  await stored(session, "click stay");
  assert.deepEqual(await tab.errors(), []);
  await tab.run(() => window.sessionReplay.stop());
  await tab.close();
  return session;
}

// replay waits until the viewer shows the visit's last click.
async function replay(browser, session) {
  const tab = await browser.open();
  await tab.go(`${h.url}/view/${session}`);
  const scene = () => document.querySelector(".scene.shown iframe")?.contentDocument;
  await until(() => tab.run(`() => (${scene})()?.getElementById("clicked")?.textContent === "stay"`), `the last click in the replay of ${session}`);
  assert.equal(await tab.run(`() => (${scene})().querySelectorAll("[replay-closed]").length`), 0, "no shadow root was closed");
  assert.deepEqual(await tab.errors(), []);
  await tab.close();
}

for (const [user, launched] of Object.entries({ firefox, webkit })) {
  test(user, { timeout: 600_000 }, async (t) => { // a browser that never answers
    const browser = await launched();
    t.after(browser.end);
    t.diagnostic(browser.version);
    pages["/"] = pages["/next"] = page(user);
    pages["/favicon.ico"] = "";
    const sessions = [];
    for (const way of Object.keys(LEAVING)) await t.test(way, async () => { sessions.push(await visit(browser, user, way)); });
    await t.test("what was typed stands nowhere", async () => {
      const all = await (await fetch(`${h.url}/sessions/export?userId=${user}`)).text();
      assert.ok(all.includes(MASK) && !all.includes(SECRET.slice(0, 4)));
    });
    await t.test("replay", async () => {
      await h.restart(); // what is shown comes from the database
      for (const session of sessions) await replay(browser, session);
    });
  });
}
