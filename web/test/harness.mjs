// What the browser tests stand on: the real server, its own PostgreSQL, real
// Chromium. Everything that is started here is ended here, by its process id.
//
//   const h = await harness({ BATCH_INTERVAL: "200" }); // the server's environment
//   h.url, h.host                   http://127.0.0.1:PORT, 127.0.0.1:PORT
//   await h.start()                 starts the server, on the same port every time
//   await h.stop(), await h.kill()  SIGTERM and wait; kill -9
//   await h.restart(env)            stop, then start, with more environment
//   await h.sql("select 1")         rows, as arrays of strings
//   await h.json("/sessions")       a REST answer; throws if it is not 2xx
//   await h.events(id)              all events of a session, as REST gives them
//   const browser = await h.launch()  Chromium with a new profile
//   const site = await h.site({ "/": "<!doctype html>…" })  a web site on another origin
//   await h.close()                 ends it all
import { execFile, execFileSync, spawn } from "node:child_process";
import { createServer } from "node:http";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer as createSocket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { chromium } from "playwright-core";

export { sleep };

const run = promisify(execFile);
const root = fileURLToPath(new URL("../..", import.meta.url));
const bigOutput = { maxBuffer: 1 << 30 };

// Milliseconds; TEST_PATIENCE, in seconds, is for who knows that there is a fault.
const PATIENCE_MS = 1000 * (process.env.TEST_PATIENCE || 300);

// until waits for check() to give something true, and gives it back. Its time
// only ends what would wait for ever: no machine is too slow for a test. The longer it
// waits, the less often it asks.
export async function until(check, what = "a condition", timeout = PATIENCE_MS) {
  const began = performance.now();
  for (;;) {
    const got = await check(), waited = performance.now() - began;
    if (got) return got;
    if (waited > timeout) throw new Error(`waited ${timeout} ms in vain for ${what}`);
    await sleep(50 + waited / 10);
  }
}

// patient makes Playwright wait as long as until does, not half a minute.
export function patient(context) {
  context.setDefaultTimeout(PATIENCE_MS);
  return context;
}

// How Chromium is started. Of what is switched off, the last line is what it would do
// for each window, which nobody sees here: two pages under the address bar and a process
// in reserve. The other lines are Playwright's own: only the last such argument counts.
export const chromiumOptions = (...args) => ({
  executablePath: execFileSync("sh", ["-c", "command -v chromium"], { encoding: "utf8" }).trim(),
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server", `--disable-features=${[
      "AvoidUnnecessaryBeforeUnloadCheckSync", "DestroyProfileOnBrowserClose", "HttpsUpgrades", "PaintHolding",
      "HttpsFirstBalancedModeAutoEnable", "ThirdPartyStoragePartitioning", "AvoidCorsURLLoaderRestartOnRedirect",
      "LensOverlay", "MediaRouter", "OptimizationHints", "NetworkTimeServiceQuerying", "AimEnabled", "PreconnectToSearch",
      "WebUIOmniboxPopup", "WebUIOmniboxAimPopup", "SpareRendererForSitePerProcess"].join()}`, ...args],
});

export async function freePort() {
  const socket = createSocket();
  await new Promise((done) => socket.listen(0, "127.0.0.1", done));
  const { port } = socket.address();
  await new Promise((done) => socket.close(done));
  return port;
}

// What a test run that is interrupted would leave behind.
const leftovers = new Set();
process.on("exit", () => leftovers.forEach((end) => end()));
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));

// TEST_SERVER is a binary that is built already; otherwise one is built once a
// process, with what web/dist holds.
let binary = process.env.TEST_SERVER;
function build() {
  if (binary) return binary;
  const dir = mkdtempSync(join(tmpdir(), "session-replay-bin-"));
  leftovers.add(() => rmSync(dir, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 }));
  execFileSync(join(root, "scripts/web"), { cwd: root, stdio: ["ignore", "inherit", "inherit"] });
  binary = join(dir, "session-replay");
  execFileSync("go", ["build", "-o", binary, "."], { cwd: root, stdio: ["ignore", "inherit", "inherit"] });
  return binary;
}

export async function harness(env = {}) {
  const program = build();
  const script = join(root, "scripts/postgres");
  const dir = mkdtempSync(join(tmpdir(), "session-replay-pg-"));
  const logs = mkdtempSync(join(tmpdir(), "session-replay-logs-"));
  const endDatabase = () => {
    try { execFileSync(script, ["stop", dir], { stdio: "ignore" }); } catch { /* it is gone already */ }
    for (const d of [dir, logs]) rmSync(d, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
  };
  leftovers.add(endDatabase);
  // Processes are killed here, machines are not: tests need not wait for the disk.
  const database = execFileSync(script, ["start", dir, "fsync = off"], { encoding: "utf8" }).trim();

  const port = await freePort();
  const host = `127.0.0.1:${port}`;
  const url = `http://${host}`;
  const browsers = [], sites = [];
  let child, output = "";

  const endServer = () => { if (child) child.kill("SIGKILL"); };
  leftovers.add(endServer);

  const h = {
    url, host, database, env: { ...env },
    log: () => output,

    async start(more = {}) {
      if (child) throw new Error("the server is running");
      Object.assign(h.env, more);
      const started = spawn(program, [], {
        cwd: dir, // no .env of a checkout reaches the tests
        env: { PATH: process.env.PATH, HOME: dir, HOST: "127.0.0.1", PORT: String(port), DATABASE_URL: database,
          LOG_DIR: logs, BATCH_INTERVAL: "200", DB_CONNECTION_TIMEOUT: "1m", ...h.env },
        stdio: ["ignore", "pipe", "pipe"],
      });
      child = started;
      started.exited = new Promise((done) => started.on("exit", (code, signal) => {
        if (child === started) child = undefined;
        done(code ?? signal);
      }));
      for (const pipe of [started.stdout, started.stderr]) pipe.on("data", (d) => { output = (output + d).slice(-200_000); });
      await until(async () => {
        if (child !== started) throw new Error(`the server ended:\n${output}`);
        return (await fetch(`${url}/health`).catch(() => ({}))).ok;
      }, "the server's /health");
    },
    async stop(signal = "SIGTERM") {
      if (!child) return undefined;
      const ending = child;
      ending.kill(signal);
      return ending.exited;
    },
    kill: () => h.stop("SIGKILL"),
    async restart(more) {
      await h.stop();
      await h.start(more);
    },

    async sql(query) {
      const { stdout } = await run("psql", ["-X", "-q", "-t", "-A", "-F", "\x1f", "-R", "\x1e", "-v", "ON_ERROR_STOP=1",
        "-d", database, "-c", query], bigOutput);
      const text = stdout.replace(/\n$/, "");
      return text === "" ? [] : text.split("\x1e").map((row) => row.split("\x1f"));
    },
    async json(path, options) {
      const answer = await fetch(url + path, options);
      if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
      return answer.json();
    },
    async events(id) {
      const events = [];
      for (;;) {
        const page = await h.json(`/sessions/${id}/events?fromIndex=${events.length}&limit=1000`);
        events.push(...page.events);
        if (page.count === 0) return events;
      }
    },

    async launch(options = {}) {
      const { args = [], ...rest } = options;
      const browser = await chromium.launch({ // playwright makes a new profile for each launch, and deletes it
        ...chromiumOptions(...args), ...rest,
      });
      browsers.push(browser);
      const newContext = browser.newContext.bind(browser); // newPage calls it too
      browser.newContext = async (...given) => patient(await newContext({ locale: "en-US", ...given[0] }));
      return browser;
    },
    // site serves pages: a path's value is HTML, or {type, body}, or a handler.
    async site(pages) {
      const server = createServer((request, response) => {
        const page = pages[new URL(request.url, "http://site").pathname];
        if (typeof page === "function") return page(request, response);
        if (page === undefined) return response.writeHead(404).end();
        response.writeHead(200, { "Content-Type": page.type ?? "text/html; charset=utf-8" });
        return response.end(page.body ?? page);
      });
      await new Promise((done) => server.listen(0, "127.0.0.1", done));
      sites.push(server);
      return `http://127.0.0.1:${server.address().port}`;
    },

    async close() {
      for (const browser of browsers) await browser.close().catch(() => {});
      for (const server of sites) { server.closeAllConnections(); server.close(); }
      if (await Promise.race([h.stop(), sleep(25_000, "late", { ref: false })]) === "late") endServer();
      endDatabase();
      leftovers.delete(endServer);
      leftovers.delete(endDatabase);
    },
  };
  try {
    await h.start();
  } catch (error) {
    await h.close();
    throw error;
  }
  return h;
}
