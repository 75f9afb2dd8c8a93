// Takes doc/viewer.png anew: the recorded demo (testdata/demo.json) in the viewer.
//
//   node web/test/screenshot.mjs
import { readFileSync, statSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { harness, until } from "./harness.mjs";

const path = (name) => fileURLToPath(new URL(`../../${name}`, import.meta.url));
const events = JSON.parse(readFileSync(path("testdata/demo.json"), "utf8"));
const start = events[0].timestamp;
const picture = path("doc/viewer.png");
const ID = "demo", USER = "ann@example.com", AT = 14; // the second that is shown

// The time of the recording moves with it, so that the page says what it says
// of any new session.
const shift = Date.now() - 60_000 - start;
const messages = [
  ["session_start", { sessionId: ID, userId: USER, url: events[0].data.href, startTime: start + shift, resume: "",
    viewport: { width: 1280, height: 800, devicePixelRatio: 1 }, timeZone: "Europe/Berlin", referrer: "",
    userAgent: "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36" }],
  ["javascript_error", { message: "Uncaught Error: The shop’s shelf fell down", timestamp: start + shift + 8000 }],
  ["events_batch", { seq: 1, events: events.map((e) => ({ ...e, timestamp: e.timestamp + shift })) }],
];

// record sends the messages as a tracker would, and waits for the ack.
const record = (page) => page.evaluate((all) => new Promise((done, fail) => {
  const socket = new WebSocket(`ws://${location.host}/ws?type=tracker`);
  const say = (type, data) => socket.send(JSON.stringify({ type, data }));
  socket.onopen = () => all.forEach(([type, data]) => say(type, data));
  socket.onclose = () => fail(new Error("the server closed the connection"));
  socket.onmessage = ({ data }) => {
    if (JSON.parse(data).type !== "events_ack") return;
    say("session_end", {});
    done();
  };
}), messages);

const h = await harness();
try {
  const browser = await h.launch();
  const page = await browser.newPage({ viewport: { width: 1120, height: 690 }, deviceScaleFactor: 0.85, colorScheme: "light" });
  await page.goto(`${h.url}/health`);
  await record(page);
  await until(async () => !(await h.json(`/sessions/${ID}`)).isActive, "the session to end");
  await page.goto(`${h.url}/view/${ID}?t=${AT}`);
  await until(() => page.evaluate(() => [...document.querySelectorAll("iframe")]
    .some((f) => f.offsetParent && f.contentDocument?.querySelector("#products li"))), "the demo in the viewer");
  await page.screenshot({ path: picture });
  const size = statSync(picture).size;
  console.log(`${picture}: ${Math.round(size / 1000)} KB`);
  if (size > 100_000) throw new Error("the picture is larger than 100 KB");
} finally {
  await h.close();
}
