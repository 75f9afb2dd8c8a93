// Tests of the scripts and make's targets that a newcomer meets first, in a copy
// of the checkout that has no .env and no data.

import { test } from "node:test";
import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import {
  chmodSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, symlinkSync,
} from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const root = join(import.meta.dirname, "..");

// copy makes a checkout without web/dist, and with what else is named.
function copy(t, ...names) {
  const dir = mkdtempSync(join(tmpdir(), "session-replay-run-"));
  t.after(() => {
    spawnSync(join(dir, "scripts/postgres"), ["stop", join(dir, ".postgres")]);
    rmSync(dir, { recursive: true, force: true });
  });
  chmodSync(dir, 0o755); // the user postgres enters it
  const always = ["Makefile", "scripts", "session-replay.service", ".env.example", "web/package-lock.json"];
  for (const name of [...always, ...names]) {
    cpSync(join(root, name), join(dir, name), { recursive: true, filter: (path) => !path.endsWith("node_modules") });
  }
  return dir;
}

// only is a PATH on which nothing but some programs is found.
function only(dir, ...programs) {
  const bin = join(dir, "bin");
  mkdirSync(bin);
  for (const name of programs) symlinkSync(execFileSync("which", [name], { encoding: "utf8" }).trim(), join(bin, name));
  return bin;
}

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((done) => server.once("listening", done));
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  return port;
}

test("on a terminal make run says where the pages are, and Ctrl-C stops all of it", { timeout: 120_000 }, async (t) => {
  const dir = copy(t, "session-replay");
  const url = `http://127.0.0.1:${await freePort()}`;
  const env = { PATH: process.env.PATH, HOME: dir, PORT: new URL(url).port };
  const terminal = spawn("script", ["-qec", "exec scripts/run", "/dev/null"], { cwd: dir, env });
  t.after(() => terminal.kill());
  let output = "";
  const ended = new Promise((done) => terminal.on("close", done));
  await new Promise((done, fail) => {
    ended.then((code) => fail(new Error(`ended with ${code}:\n${output}`)));
    terminal.stdout.on("data", (data) => {
      output += data;
      if (output.includes("Ctrl-C stops") && output.includes("database ready")) done();
    });
  });
  assert.ok(output.includes(`Viewer ${url} · demo ${url}/demo · data in .postgres/ · Ctrl-C stops`), output);
  while ((await fetch(`${url}/health`)).status !== 200) await new Promise((done) => setTimeout(done, 50));
  assert.equal((await fetch(`${url}/demo`)).status, 200);
  assert.ok(existsSync(join(dir, ".postgres/data/postmaster.pid")));

  terminal.stdin.write("\x03");
  assert.equal(await ended, 0, output);
  assert.match(output, /everything is stored/);
  assert.ok(!existsSync(join(dir, ".postgres/data/postmaster.pid")), "PostgreSQL still runs");
  await assert.rejects(fetch(`${url}/health`));
});

test("without npm make run stops, and make build says what is missing", (t) => {
  const dir = copy(t);
  // Go keeps the caller's home: it would fetch its toolchain into another, and a process that it leaves behind
  // would still write there while the directory is removed.
  const env = { PATH: only(dir, "dirname", "cmp", "cat", "make", "go"), HOME: process.env.HOME };
  const run = spawnSync("make", ["run"], { cwd: dir, env, encoding: "utf8" });
  assert.notEqual(run.status, 0);
  assert.match(run.stderr, /npm is missing/);
  assert.doesNotMatch(run.stdout, /go build/);
  const web = spawnSync("make", ["web"], { cwd: dir, env, encoding: "utf8" });
  assert.equal(web.status, 0, web.stderr);
  assert.match(web.stderr, /can neither record/);
});

test("a missing Go is named in one line", (t) => {
  const dir = copy(t);
  const env = { PATH: only(dir, "make") };
  const { status, stdout, stderr } = spawnSync("make", ["build"], { cwd: dir, env, encoding: "utf8" });
  assert.notEqual(status, 0);
  assert.match(stdout + stderr, /^Go is missing.*\nmake: \*\*\* .*\n$/);
});

test("make uninstall takes away what make install put there, but no settings", (t) => {
  const dir = copy(t, "session-replay");
  const there = join(dir, "there");
  const files = () => readdirSync(there, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile()).map((entry) => entry.name).sort();
  const make = (target) =>
    execFileSync("make", [target, `DESTDIR=${there}`, "PREFIX=/opt"], { cwd: dir, encoding: "utf8" });
  make("install");
  assert.deepEqual(files(), ["env", "session-replay", "session-replay.service"]);
  const unit = readFileSync(join(there, "lib/systemd/system/session-replay.service"), "utf8");
  assert.match(unit, /ExecStart=\/opt\/bin\/session-replay/);
  assert.match(make("uninstall"), /rm -r .*\/etc\/session-replay/);
  assert.deepEqual(files(), ["env"]);
});
