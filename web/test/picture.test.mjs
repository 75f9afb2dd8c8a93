// Pages beside their replay: each page in pages/ is recorded by the real tracker
// in real Chromium, and shown in the real viewer, sought to its end and played to
// its end. What is seen there must be what was seen on the page.
//
//   node --test web/test/picture.test.mjs
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { harness, until } from "./harness.mjs";
import { isDoubtful, Timeline } from "../timeline.js";

const pages = new URL("pages/", import.meta.url);
const visiting = { viewport: { width: 1000, height: 700 } }, viewing = { viewport: { width: 1440, height: 900 } };
const TYPES = { html: "text/html; charset=utf-8", css: "text/css", svg: "image/svg+xml", ttf: "font/ttf" };
let h, browser, here, other, visitor, viewer;

before(async () => {
  h = await harness({ SESSION_GRACE_PERIOD: "500" });
  browser = await h.launch();
  visitor = await (await browser.newContext(visiting)).newPage();
  viewer = await (await browser.newContext(viewing)).newPage();
  const late = (request) => (request.url.endsWith("?slow") ? 1500 : 0); // behind the first snapshot
  const served = Object.fromEntries(readdirSync(pages).map((name) => [`/${name}`,
    (request, response) => setTimeout(serve, late(request), name, response)]));
  other = await h.site(served);
  here = await h.site(served);
});
after(() => h?.close());

function serve(name, response) {
  const file = readFileSync(new URL(name, pages));
  const headers = { "Content-Type": TYPES[name.split(".").pop()] };
  if (name.includes(".cors.")) headers["Access-Control-Allow-Origin"] = "*";
  if (!name.endsWith(".html")) return response.writeHead(200, headers).end(file);
  const html = file.toString().replace(/<!--tracker ?(.*?)-->/, `<script src="${h.url}/tracker.js" async $1></script>`)
    .replaceAll("{{other}}", other).replaceAll("{{server}}", h.url).replaceAll("{{socket}}", h.url.replace("http", "ws"));
  const own = /<!--headers (.*?)-->/.exec(html);
  return response.writeHead(200, { ...headers, ...JSON.parse(own?.[1] ?? "{}") }).end(html);
}

// settled waits until what a page has begun is drawn and recorded: observers
// report before the second frame.
const settled = (page) => page.evaluate(async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await document.fonts.ready;
  for (let i = 0; i < 3; i++) await frame();
});

// record visits a page, does something there, and gives the session's id and what
// see(document) saw at the end. Without a context of its own it is a visit of the
// page that all tests share, and so is who watches. enough tells from the recorded events whether all
// of it has been recorded, where that takes its time.
async function record(name, { act, see, context, enough }) {
  const page = context ? await browser.newPage({ ...visiting, ...context }) : visitor;
  await page.goto(`${here}/${name}.html`);
  await page.waitForFunction(() => window.sessionReplay?.sessionId);
  const id = await page.evaluate(() => window.sessionReplay.sessionId);
  await until(async () => (await h.json(`/sessions/${id}`).catch(() => ({}))).snapshotIndex != null, "a full snapshot");
  await act?.(page);
  await settled(page);
  if (enough) await until(async () => enough(await h.events(id)), "the recording");
  const seen = await page.evaluate(`(${see})(document)`);
  await page.evaluate(() => window.sessionReplay.stop());
  await (context ? page.close() : page.mouse.move(0, 0)); // the next page is under no mouse
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the session's end");
  return { id, seen };
}

async function watch(t, id, context) {
  const view = context ? await browser.newPage({ ...viewing, ...context }) : viewer;
  const errors = [], note = (error) => errors.push(error.stack);
  view.on("pageerror", note);
  t.after(async () => {
    view.off("pageerror", note);
    if (context) await view.close();
    assert.deepEqual(errors, [], "errors in the viewer");
  });
  await view.goto(`${h.url}/view/${id}`);
  await view.waitForFunction(() => ["playing", "ended"].includes(window.player?.state));
  return view;
}

async function seek(view) {
  await view.evaluate(async () => {
    player.pause();
    await player.seek(player.recording.start); // it may be at its end already, and would not have leapt there
    await player.seek(player.recording.end);
    player.pause();
  });
  return view;
}
const watchEnd = async (...args) => seek(await watch(...args));

// replays compares: what the replay shows becomes what was seen, when the styles
// of a moment are there and motions have ended.
async function replays(view, see, seen, how) {
  const look = () => view.evaluate(`(${see})(player.scene.replayer.iframe.contentDocument)`).catch((error) => `threw ${error}`);
  let shown;
  await until(async () => JSON.stringify(shown = await look()) === JSON.stringify(seen)).catch(() => {});
  assert.deepEqual(shown, seen, how);
}

// same is the whole way. want is what must be seen on the page, if see does not
// only compare; viewer is the context of who watches.
async function same(t, name, { want, viewer, ...visit }) {
  const { id, seen } = await record(name, visit);
  if (want !== undefined) assert.deepEqual(seen, want, "the page itself");
  const view = await watch(t, id, viewer);
  await view.evaluate(() => player.setSpeed(4));
  await view.waitForFunction(() => player.state === "ended");
  await replays(view, visit.see, seen, "played");
  await replays(await seek(view), visit.see, seen, "sought");
  return view;
}

const change = (page) => page.evaluate(() => window.change());
const dark = "rgb(1, 1, 1)";
const colors = `(doc) => Object.fromEntries([...doc.querySelectorAll("p[id]")].map((p) => [p.id, getComputedStyle(p).color]))`;
const all = (ids) => Object.fromEntries([...ids].map((id) => [id, dark]));

// What is not recorded.

const boxes = `(doc) => ["plain", "share", "canvas", "video", "object", "button", "source", "added", "sprite", "foreign", "end"].map((id) => {
  const { left, top, width, height } = doc.getElementById(id).getBoundingClientRect();
  return [id, ...[left, top, width, height].map(Math.round)].join(" ");
})`;

test("what is not recorded keeps its room, and says what it was", async (t) => {
  const view = await same(t, "boxes", {
    act: async (page) => {
      await page.waitForFunction(() => document.readyState === "complete");
      await page.evaluate(async () => {
        late.innerHTML = "<img id=added src=picture.svg height=77>";
        share.style.width = "80%";
        await added.decode();
      });
    },
    see: boxes,
  });
  const words = await view.evaluate(() => {
    const doc = player.scene.replayer.iframe.contentDocument;
    const drawn = (el) => decodeURIComponent(el.src || el.poster || el.style.backgroundImage);
    return ["plain", "canvas", "video", "foreign"].map((id) => />([^<>]+)<\/text>/.exec(drawn(doc.getElementById(id)))?.[1]);
  });
  assert.deepEqual(words, ["a picture", "canvas is not recorded", "video is not recorded", "a page of another origin is not recorded"]);
});

const icons = `(doc) => [..."abcde"].map((id) => Math.round(doc.getElementById(id).getBoundingClientRect().left))`;
test("icons of a font keep their room", (t) => same(t, "icons", { see: icons }));

test("a closed shadow root is marked; what is just empty is not", async (t) => {
  const { id } = await record("closed", { see: "() => 0" });
  const view = await watchEnd(t, id);
  await replays(view, `(doc) => [...doc.querySelectorAll("[replay-closed]")].map((el) => el.id)`, ["w"], "marked");
});

test("copies of pictures and canvases, on demand, but of nothing masked", async (t) => {
  const isCanvas = (e) => e.type === 3 && e.data.source === 9;
  const { id } = await record("copies", {
    see: "() => 0",
    enough: (events) => events.filter(isCanvas).length > 1 && JSON.stringify(events).includes("replay-image"),
  });
  const masked = (await h.events(id)).filter((e) => isCanvas(e) && e.data.commands.length === 0);
  assert.ok(masked.length > 0, "the masked canvas sends no picture");
  const view = await watchEnd(t, id);
  const copied = `(doc) => [doc.querySelector("#a").src, doc.querySelector("#c").style.backgroundImage, doc.querySelector("#m").src,
    doc.querySelector("#k").style.backgroundImage].map((image) => image.includes("image/webp"))`;
  await replays(view, copied, [true, true, false, false], "copied");
  assert.deepEqual(await view.evaluate(() => [...document.querySelectorAll("iframe")].map((f) => f.getAttribute("sandbox"))), ["allow-same-origin"]);
});

// Media features.

test("a page keeps the visitor's media features, however a style sheet came", (t) => same(t, "media", {
  context: { colorScheme: "dark", reducedMotion: "reduce" }, viewer: { colorScheme: "light" },
  act: (page) => page.evaluate(() => fill()),
  see: `(doc) => ({ ...(${colors})(doc), width: doc.querySelector("#img").offsetWidth })`, want: { ...all("abcdefghi"), width: 40 },
}));

test("media features that change in mid-visit", (t) => same(t, "media", {
  context: { colorScheme: "dark" }, viewer: { colorScheme: "light", reducedMotion: "reduce" },
  act: async (page) => {
    await page.evaluate(() => fill());
    await page.emulateMedia({ colorScheme: "light" });
  },
  see: `(doc) => ({ ...(${colors})(doc), width: doc.querySelector("#img").offsetWidth })`,
}));

test("a page of a telephone, seen on a desk", (t) => same(t, "touch", {
  context: { hasTouch: true, isMobile: true }, see: colors, want: { a: dark, b: dark, c: "rgb(0, 0, 0)" },
}));

// States.

const states = `(doc) => {
  const root = doc.querySelector("#host").shadowRoot, style = (el) => doc.defaultView.getComputedStyle(el);
  return { half: [doc, root].map((r) => r.querySelector("#half").indeterminate), menu: [doc, root].map((r) => style(r.querySelector("#menu")).display),
    defined: ["x-early", "x-late", "x-never"].map((name) => style(doc.querySelector(name)).display),
    help: style(doc.querySelector("#help")).display, host: style(doc.querySelector("#host")).borderTopWidth, p: style(root.querySelector("p")).display };
}`;

test("what CSS may ask and no attribute shows, in shadow roots too", async (t) => {
  const want = { half: [true, true], menu: ["block", "block"], defined: ["inline", "inline", "none"], help: "none", host: "5px", p: "block" };
  const act = async (page) => {
    await page.click("#field");
    await change(page);
    await page.evaluate(() => root.querySelector("input").focus());
  };
  await same(t, "states", { act, see: states, want });
});

test("what has the focus, and what is full-screen", async (t) => {
  await same(t, "states", { act: (page) => page.click("#field"), see: `(doc) => getComputedStyle(doc.querySelector("#help")).display`, want: "block" });
  await same(t, "states", {
    act: async (page) => {
      await page.evaluate(() => { full.onclick = () => full.requestFullscreen(); });
      await page.click("#full");
      await page.waitForFunction(() => document.fullscreenElement);
    },
    see: `(doc) => { const f = doc.querySelector("#full"); return [getComputedStyle(f).color, f.getBoundingClientRect().height > 500]; }`, want: [dark, true],
  });
});

test("a popover that was closed again is closed", (t) => same(t, "states", {
  act: async (page) => {
    for (let i = 0; i < 2; i++) {
      await page.click("#open");
      await settled(page);
    }
  },
  see: `(doc) => getComputedStyle(doc.querySelector("#menu")).display`, want: "none",
}));

for (const [id, see] of [["a", `(doc) => doc.querySelector("#a i")`], ["b", `(doc) => doc.querySelector("#b i")`],
  ["s", `(doc) => doc.querySelector("#s").shadowRoot.querySelector("u")`], ["s b", `(doc) => doc.querySelector("#s").shadowRoot.querySelector("i")`]]) {
  test(`a menu under the mouse: ${id}`, (t) => same(t, "hover", {
    act: (page) => page.hover(`#${id}`), enough: (events) => events.some((e) => e.type === 3 && e.data.source === 1),
    see: `(doc) => getComputedStyle((${see})(doc)).display`, want: "block",
  }));
}

// Style sheets.

test("sheets that come, go, and are switched", (t) => same(t, "sheets", {
  act: async (page) => {
    await change(page);
    await page.waitForFunction((want) => [..."abcdegh"].every((id) => getComputedStyle(document.getElementById(id)).color === want), dark);
  },
  see: `(doc) => ({ ...(${colors})(doc), host: getComputedStyle(doc.querySelector("#host").shadowRoot.querySelector("p")).color })`,
  want: { ...all("abcdefgh"), host: dark },
  enough: (events) => JSON.stringify(events).includes("dot.png"), // the CDN's sheet, which the tracker fetches
}));

test("sheets that nobody may read are told", async (t) => {
  const { id } = await record("foreign", { see: "() => 0", enough: (events) => JSON.stringify(events).match(/replay-missing/g)?.length === 2 });
  const view = await watchEnd(t, id);
  await until(async () => /2 style sheets/.test(await view.textContent("#note")), "the note");
});

test("shorthands with var() and a longhand after them", (t) => same(t, "shorthand", {
  act: async (page) => {
    await change(page);
    await settled(page);
    await page.evaluate(() => { g.style.paddingLeft = "3px"; });
  },
  see: `(doc) => [...doc.querySelectorAll("p[id]"), doc.querySelector("#host").shadowRoot.querySelector("p")]
    .map((p) => [p.id, getComputedStyle(p).padding, getComputedStyle(p).backgroundColor].join(" "))`,
}));

test("a component with adopted sheets that is taken out and put back", (t) => same(t, "readopt", {
  act: async (page) => {
    await page.evaluate(() => { window.two = document.querySelector("x-two"); two.remove(); });
    await settled(page);
    await page.evaluate(() => m.append(two));
  },
  see: `(doc) => getComputedStyle(doc.querySelector("x-two").shadowRoot.querySelector("p")).color`, want: "rgb(4, 5, 6)",
}));

test("url(#id) points into the page", (t) => same(t, "paint", {
  see: `(doc) => [getComputedStyle(doc.querySelector("#a")).clipPath, getComputedStyle(doc.querySelector("#b")).fill,
    getComputedStyle(doc.querySelector("#b")).clipPath].map((value) => value.replace(/"/g, ""))`,
  want: ["url(#c)", "url(#g)", "url(#c)"],
}));

test("a drawing that is used by the page's own address", (t) => same(t, "paint", {
  act: (page) => page.evaluate(() => {
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    use.setAttributeNS("http://www.w3.org/1999/xlink", "href", `${location}#a`);
    document.querySelector("svg").append(use);
  }),
  see: `(doc) => Math.round(doc.querySelector("use").getBoundingClientRect().width)`, want: 100,
}));

test("style text in pieces, rules inserted, deleted and changed", (t) => same(t, "pieces", {
  act: (page) => page.evaluate(() => {
    s.sheet.insertRule("#c{color:rgb(7,8,9)}", s.sheet.cssRules.length);
    s.sheet.cssRules[1].cssRules[0].style.setProperty("color", "rgb(4, 5, 6)");
    s.sheet.deleteRule(0);
  }),
  see: colors, want: { a: "rgb(0, 0, 0)", b: "rgb(4, 5, 6)", c: "rgb(7, 8, 9)", d: dark },
}));

test("imports that fail and that load, layers, containers", (t) => same(t, "imports", {
  enough: (events) => JSON.stringify(events).includes("#h, #i"),
  see: `(doc) => ({ ...(${colors})(doc), q: getComputedStyle(doc.querySelector("#d"), "::before").content })`,
  want: { a: "rgb(9, 9, 9)", b: "rgb(7, 8, 9)", c: "rgb(4, 5, 6)", d: "rgb(0, 0, 0)", i: dark, q: '"\\"q"' },
}));

// Motion.

test("sought past animations, their end is seen", async (t) => {
  const { id } = await record("motion", { see: "() => 0", act: change, enough: (events) => JSON.stringify(events).includes("replay-motion") });
  const view = await watchEnd(t, id);
  const opacities = `(doc) => [doc.querySelector(".card"), ...["t", "d", "p", "f"].map((id) => doc.getElementById(id)),
    doc.querySelector("#host").shadowRoot.querySelector("b")].map((el) => getComputedStyle(el).opacity)`;
  await replays(view, opacities, ["1", "0.2", "0.3", "0.5", "0.25", "1"], "sought");
  assert.equal(await view.evaluate(() => player.scene.replayer.iframe.contentDocument.querySelector("#n").getAnimations().length), 1, "the endless one goes on");
});

test("element.animate() and what it leaves behind", (t) => same(t, "motion", {
  act: change, see: `(doc) => ["p", "f"].map((id) => getComputedStyle(doc.getElementById(id)).opacity)`, want: ["0.5", "0.25"],
}));

// Frames, and what replays well anyway.

test("frames that are written again, moved, replaced", (t) => same(t, "frames", {
  act: async (page) => {
    await page.waitForFunction(() => document.readyState === "complete");
    await change(page);
    await page.waitForFunction(() => ["moved", "again", "new"].every((id) => document.getElementById(id)?.contentDocument?.querySelector("p")));
  },
  see: `(doc) => ["moved", "again", "new", "written"].map((id) => doc.getElementById(id).contentDocument.body.textContent.trim())`,
  want: ["moved", "second", "new", "second text"],
  enough: (events) => ["second text", "second", "new"].every((text) => JSON.stringify(events).includes(`"textContent":"${text}"`)),
}));

test("inner scroll positions", (t) => same(t, "scroll", {
  act: async (page) => {
    await change(page);
    await page.waitForFunction(() => b.scrollTop === 900);
  },
  see: `(doc) => [doc.querySelector("#a"), doc.querySelector("#b"), doc.querySelector("#s").shadowRoot.querySelector("div"), doc.querySelector("#d")].map((e) => Math.round(e.scrollTop))`,
  want: [500, 900, 700, 600],
  enough: (events) => [900, 700, 600].every((y) => events.some((e) => e.type === 3 && e.data.source === 3 && Math.round(e.data.y) === y)),
}));

test("dialogs, and their order", (t) => same(t, "dialogs", {
  act: async (page) => {
    await page.evaluate(() => d2.showModal());
    await settled(page);
    await page.evaluate(() => d1.showModal());
  },
  see: `(doc) => [doc.querySelector("#d1").matches(":modal"), doc.querySelector("#d2").matches(":modal"), doc.querySelector("#d3").open,
    doc.elementFromPoint(500, 350).closest("dialog")?.id]`,
  want: [true, true, true, "d1"],
}));

test("controls whose state is no text", (t) => same(t, "controls", {
  act: async (page) => {
    await page.check("#c");
    await page.check("#r2");
    await page.selectOption("#s", "fr");
    await page.evaluate(() => { p.value = 70; document.querySelector("details").open = true; });
  },
  see: `(doc) => [doc.querySelector("#c").checked, doc.querySelector("#r2").checked, doc.querySelector("details").open, doc.querySelector("#p").value,
    doc.querySelector("#s").offsetWidth]`,
}));

test("a date and a number hold something, and nobody may read what", async (t) => {
  const view = await same(t, "controls", {
    act: async (page) => {
      await page.fill("#d", "2026-01-02");
      await page.fill("#n", "4711");
    },
    see: `(doc) => ["d", "e", "n"].map((id) => doc.getElementById(id).value !== "")`, want: [true, false, true],
  });
  const seen = `(doc) => ["d", "n"].map((id) => [doc.getElementById(id).value, getComputedStyle(doc.getElementById(id)).webkitTextSecurity])`;
  await replays(view, seen, [["2000-01-01", "disc"], ["0000", "disc"]], "dots");
});

test("what is typed is as valid as it was", (t) => same(t, "controls", {
  act: async (page) => {
    await page.fill(".mail", "ann@shop.example");
    await page.fill(".mail + .mail", "ann");
  },
  see: `(doc) => [...doc.querySelectorAll(".mail")].map((el) => getComputedStyle(el).color)`,
  want: ["rgb(1, 1, 1)", "rgb(2, 2, 2)", "rgb(3, 3, 3)"],
}));

test("the browser's own focus ring", (t) => same(t, "states", {
  act: (page) => page.keyboard.press("Tab"),
  see: `(doc) => ["#open", "#field"].map((id) => getComputedStyle(doc.querySelector(id)).outlineStyle)`, want: ["auto", "none"],
}));

test("a body that is replaced", (t) => same(t, "swap", {
  act: async (page) => {
    for (const word of ["two", "three"]) {
      await page.evaluate((text) => {
        const body = document.createElement("body");
        body.className = text;
        body.innerHTML = `<h1>${text}</h1>`;
        document.documentElement.replaceChild(body, document.body);
      }, word);
      await settled(page);
    }
  },
  see: `(doc) => [doc.querySelector("h1").textContent, doc.body.className]`, want: ["three", "three"],
}));

test("a page without a doctype", (t) => same(t, "quirks", {
  see: `(doc) => [doc.compatMode, doc.querySelector("#h").getBoundingClientRect().height > 300]`, want: ["BackCompat", true],
}));

test("a data: picture of 200 KB, again and again", (t) => same(t, "camera", {
  act: async (page) => {
    for (let i = 0; i < 30; i++) {
      await page.evaluate(() => next());
      await settled(page);
    }
    await page.evaluate(() => { document.querySelector("h1").textContent = "end"; });
  },
  see: `(doc) => doc.querySelector("h1").textContent`, want: "end",
  enough: (events) => JSON.stringify(events.slice(-5)).includes('"end"'),
}));

for (const name of ["isolated", "strict"]) {
  test(`a page with headers: ${name}`, (t) => same(t, name, {
    act: (page) => page.evaluate(() => { document.querySelector("h1").append(" changed"); }),
    see: `(doc) => doc.querySelector("h1").textContent.split(" ")[1]`, want: "changed",
  }));
}

// Time.

const times = (timeline, index, raw) => timeline.take(index, raw.map((timestamp) => ({ timestamp }))).map((e) => e.timestamp);
const HOUR = 3600_000, YEAR = 365 * 24 * HOUR;

test("the time line: steps of the clock are taken out", () => {
  const seconds = (...list) => list.map((s) => 1e12 + s * 1000);
  const cases = {
    "as it was": [seconds(0, 1, 2), seconds(0, 1, 2)],
    "a little mixed up": [seconds(0, 1, 0.5, 2), seconds(0, 1, 1, 2)],
    "a long pause": [seconds(0, 60 * 3600), seconds(0, 60 * 3600)],
    "set back": [[...seconds(0, 5), 1e12 + 6000 - HOUR, 1e12 + 8000 - HOUR], seconds(0, 5, 5, 7)],
    "set back and right again": [[...seconds(0, 5), 1e12 + 6000 - HOUR, ...seconds(7, 8)], seconds(0, 5, 5, 7, 8)],
    "set forward by years": [[...seconds(0, 1), 1e12 + 2000 + YEAR, 1e12 + 3000 + YEAR], seconds(0, 1, 1, 2)],
    "one event of another time": [[...seconds(0, 1), 1e12 + 50 * YEAR, ...seconds(3, 4)], seconds(0, 1, 1, 3, 4)],
    "one of none": [[0, NaN, 1, undefined, 1e300], [0, NaN, 1, undefined, 1e300]],
    "one moment": [seconds(1, 1, 1), seconds(1, 1, 1)],
  };
  for (const [name, [raw, want]] of Object.entries(cases)) assert.deepEqual(times(new Timeline(), 0, raw), want, name);
});

test("the time line goes on from piece to piece, in whatever order they are read", () => {
  const timeline = new Timeline();
  const bounds = (index, count, ...raw) => timeline.take(index, raw.map((timestamp) => ({ timestamp })), count).map((e) => e.timestamp);
  bounds(0, 10, 1000, 9000);
  assert.deepEqual(times(timeline, 10, [10_000, 11_000 - HOUR]), [10_000, 10_000]);
  assert.deepEqual(bounds(12, 8, 12_000 - HOUR, 19_000 - HOUR), [11_000, 18_000]);
  assert.deepEqual(times(timeline, 0, [1000, 2000]), [1000, 2000], "again from the start");
  assert.deepEqual(times(timeline, 12, [12_000 - HOUR, 13_000 - HOUR]), [11_000, 12_000], "again behind the step");
  assert.deepEqual(times(timeline, 15, [15_500 - HOUR]), [14_500], "in the middle");
});

test("which chunks are looked into", () => {
  const chunk = (startTime, endTime) => ({ startTime, endTime });
  const a = chunk(0, 5000), b = chunk(5000, 9000), c = chunk(9500, 14_000);
  assert.ok(!isDoubtful(a, undefined, b) && !isDoubtful(b, a, c) && !isDoubtful(c, b, undefined));
  assert.ok(isDoubtful(b, a, chunk(3000, 6000)) && isDoubtful(chunk(2000, 6000), a, c), "they overlap");
  assert.ok(isDoubtful(chunk(5000, HOUR), a, undefined), "an hour in one chunk");
  assert.ok(isDoubtful(a, undefined, undefined), "the only one");
});

// recorded sends events as a recorder would, one batch each, and gives the session's id.
async function recorded(batches) {
  await visitor.goto(`${here}/p.css`); // any page that does not record
  const id = `times-${Math.round(performance.now() * 1000)}`;
  await visitor.evaluate(([url, id, batches]) => new Promise((done) => {
    const socket = new WebSocket(url), say = (type, data) => socket.send(JSON.stringify({ type, data }));
    socket.onopen = () => {
      say("session_start", { sessionId: id, resume: "", url: "http://shop.example/" });
      batches.forEach((events, i) => say("events_batch", { seq: i + 1, events }));
    };
    socket.onmessage = ({ data }) => {
      const answer = JSON.parse(data);
      if (answer.type === "events_ack" && answer.data.seq === batches.length) {
        say("session_end", { sessionId: id });
        done();
      }
    };
  }), [h.url.replace("http", "ws") + "/ws?type=tracker", id, batches]);
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the session's end");
  return id;
}

const START = Date.UTC(2026, 0, 1);
const node = (id, tagName, childNodes, attributes = {}) => ({ type: 2, id, tagName, attributes, childNodes });
const first = (timestamp) => [
  { type: 4, timestamp, data: { href: "http://shop.example/", width: 800, height: 600 } },
  { type: 2, timestamp, data: { initialOffset: { left: 0, top: 0 }, node: { type: 0, id: 1, childNodes: [
    node(2, "html", [node(3, "head", []), node(4, "body", [node(5, "p", [{ type: 3, id: 6, textContent: "0" }])])])] } } },
];
const says = (timestamp, value) => ({ type: 3, timestamp, data: { source: 0, texts: [{ id: 6, value }], attributes: [], removes: [], adds: [] } });
const visit = (clock) => [first(START), ...Array.from({ length: 20 }, (_, i) => [says(clock(i + 1), String(i + 1))])];

for (const [name, clock, length] of [
  ["set back by an hour", (s) => START + s * 1000 - (s > 5 ? HOUR : 0), 20],
  ["one event 50 years ahead", (s) => START + s * 1000 + (s === 5 ? 50 * YEAR : 0), 20],
  ["all at one moment", () => START, 0],
  ["fractions of milliseconds", (s) => START + s * 1000 + 0.25, 20],
]) {
  test(`the replay's length is the visit's: ${name}`, async (t) => {
    const view = await watchEnd(t, await recorded(visit(clock)));
    const took = await view.evaluate(() => (player.recording.end - player.recording.start) / 1000);
    assert.ok(Math.abs(took - length) <= 1.5, `it takes ${took} s`);
    await replays(view, `(doc) => doc.querySelector("p").textContent`, "20", "the end");
    if (length === 0) return;
    await view.evaluate(() => player.seek(player.recording.start + 10_500));
    const shown = Number(await view.evaluate(() => player.scene.replayer.iframe.contentDocument.querySelector("p").textContent));
    assert.ok(Math.abs(shown - 10) <= 1, `10 seconds after the start it shows ${shown}`);
  });
}

test("changes before the first snapshot, and text that no database likes", async (t) => {
  const odd = await recorded([[says(START, "1")], [...first(START + 1000), says(START + 2000, "end\u0000\ud83d")]]);
  await replays(await watchEnd(t, odd), `(doc) => doc.querySelector("p").textContent.slice(0, 3)`, "end", "the end");
});

// It restarts the server, so it is the last one.
test("MEDIA_ORIGINS: pictures and style sheets of these are loaded, no others", async (t) => {
  const { id } = await record("foreign", { see: "() => 0", act: (page) => page.evaluate((other) => {
    document.body.insertAdjacentHTML("beforeend", `<img id="there" src="${other}/picture.svg"><img id="here" src="picture.svg">`);
    return Promise.all([there.decode(), globalThis.here.decode()]);
  }, other) });
  const font = await record("icons", { see: icons });
  await h.restart({ MEDIA_ORIGINS: other });
  const view = await watchEnd(t, id);
  await replays(view, `(doc) => [...doc.images].map((image) => [image.id, image.currentSrc.startsWith("data:"), image.naturalWidth > 0].join(" "))`,
    ["there false true", "here true true"], "loaded");
  await replays(view, `(doc) => doc.querySelectorAll("link").length`, 2, "links that stay");
  const drawn = await watchEnd(t, font.id);
  await replays(drawn, icons, font.seen, "icons");
  await replays(drawn, `(doc) => [..."abcd"].map((id) => getComputedStyle(doc.getElementById(id)).backgroundImage)`, Array(4).fill("none"), "no box");
});
