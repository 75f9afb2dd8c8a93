// The part of the tracker that notes what the picture needs and rrweb does not
// record. tracker.js calls picture.complete() with each event before it is pushed, and
// picture.took() after that. The notes are attributes, and travel as rrweb's
// own mutations, in their place among all others:
//
//   replay-size     "W H": the box of what is not recorded (pictures, canvases, icons)
//   replay-state    what a selector may ask and no attribute shows: focus, popover-open …
//   replay-media    of the html element: the media features that the visitor has
//   replay-motion   what element.animate() does, as JSON
//   replay-closed   a closed shadow root: nobody can read it
//   replay-foreign  of a frame: its document may not be read
//   replay-image    of a picture: a copy, as a data: address (data-inline-images)
//   replay-missing  of a link: its style sheet may not be read
const picture = (() => {
  const { matches } = Element.prototype; // of a form it may be a field
  const BOXES = /^(img|video|canvas|object|embed)$/;
  const HOSTS = /-|^(article|aside|div|footer|header|main|nav|p|section|span)$/; // a shadow root can be closed there
  const OTHERS = /^(img|input|video|canvas|object|embed|iframe|b|em|i)$/; // have a box, or an icon
  const ICON = /[\ue000-\uf8ff]/, ICON_FONT = /^[^,]*(icon|symbol|awesome|glyph)/i; // private use; or words that a font draws
  const STATES = ["popover-open", "fullscreen", "focus", "focus-visible", "target", "indeterminate", "invalid", "user-invalid", "user-valid"]
    .filter((state) => CSS.supports(`selector(:${state})`));
  const ANY_STATE = [":not(:defined)", ...STATES.map((state) => ":" + state)].join();
  const FEATURES = ["prefers-color-scheme:light dark", "prefers-reduced-motion:no-preference reduce",
    "prefers-reduced-transparency:no-preference reduce", "prefers-contrast:no-preference more less custom",
    "forced-colors:none active", "inverted-colors:none inverted", "hover:none hover", "any-hover:none hover",
    "pointer:none coarse fine", "any-pointer:none coarse fine"]
    .flatMap((line) => line.split(":")[1].split(" ").map((value) => `${line.split(":")[0]}:${value}`));
  const LOOK_MS = 100, IDLE_LOOK_MS = 1000, IDLE_LOOK_MAX_MS = 30000;
  const MEASURE_MS = 10; // of the elements in one look
  const SHARE = 20; // between two looks is this many times the time of one
  // A browser's own text of a shorthand with var(), of which a longhand is set later.
  const BROKEN = /(^|[^\w-])(?!--)[a-z-]+: ;/, EMPTY = /(^|[^\w-])(?!--)([a-z-]+): (?=;)/g;

  const roots = new Set(); // documents and shadow roots that are recorded
  const met = new WeakSet(); // roots that rrweb knows: it tells of their adopted sheets once
  const worn = new WeakMap(); // root → its adopted sheets, as they were recorded
  const read = new WeakMap(); // link → the address whose sheet is recorded
  const sources = new Map(); // address → what fetch made of it
  const copies = new WeakMap(); // img → {src, url}
  const icons = new Set();
  let told = new Map(); // element → {attribute: what was told of it} since the last full snapshot
  let states = new Map(); // element → replay-state
  let news = new Map(); // element → {attribute: value}, to be sent
  let fresh = []; // elements whose box is to be looked at
  let timer = 0, sending = false;
  let cost = 0, idle = 0, pause = IDLE_LOOK_MS; // ms: of the last look; until the next one of an idle page

  // What is told.

  function note(el, name, value, key = value) {
    if (record.mirror.getId(el) < 1) return;
    const known = told.get(el) || {};
    if ((name in known ? known[name] : null) === key) return;
    told.set(el, { ...known, [name]: key });
    news.set(el, { ...news.get(el), [name]: value });
  }

  function send() {
    const attributes = [...news].map(([el, a]) => ({ id: record.mirror.getId(el), attributes: a })).filter(({ id }) => id > 0);
    news = new Map();
    if (!attributes.length) return;
    sending = true;
    emit({ type: INCREMENTAL, data: { source: MUTATION, texts: [], removes: [], adds: [], attributes } });
    sending = false;
  }

  function soon() {
    if (pause > IDLE_LOOK_MS) rest(IDLE_LOOK_MS);
    timer = timer || setTimeout(safe(() => look()), Math.min(Math.max(LOOK_MS, SHARE * cost), IDLE_LOOK_MS));
  }

  function rest(ms) {
    pause = ms;
    clearTimeout(idle);
    idle = setTimeout(safe(idleLook), Math.max(pause, SHARE * cost));
  }

  // idleLook is for what no event tells, a new title, sheet.disabled = true and the
  // like. It comes less and less often while nothing happens.
  function idleLook() {
    rest(Math.min(2 * pause, IDLE_LOOK_MAX_MS));
    if (isHidden(document) || !stopRecorder || !roots.size) return;
    noteMissed();
    look();
  }

  function look(most = MEASURE_MS) {
    const begun = performance.now();
    clearTimeout(timer);
    timer = 0;
    const found = new Map(), moving = new Map();
    for (const root of roots) {
      if (!(root.host ? root.isConnected : root.defaultView)) { roots.delete(root); continue; }
      for (const el of root.querySelectorAll(ANY_STATE)) {
        found.set(el, STATES.filter((s) => matches.call(el, ":" + s)).join(" ") || "undefined");
      }
      for (const el of root.querySelectorAll("style, link")) {
        if (el.disabled || el.sheet && el.sheet.disabled) found.set(el, "disabled");
      }
      for (const a of root.getAnimations ? root.getAnimations() : []) noteMotion(a, moving);
      noteAdopted(root);
    }
    for (const el of states.keys()) if (!found.has(el)) note(el, "replay-state", null);
    for (const [el, state] of found) note(el, "replay-state", state);
    states = found;
    for (const el of told.keys()) if (told.get(el)["replay-motion"] && !moving.has(el)) note(el, "replay-motion", null);
    for (const [el, list] of moving) note(el, "replay-motion", stringify(list), stringify(list.map((m) => ({ ...m, at: m.paused && m.at }))));
    for (const start = performance.now(); fresh.length && performance.now() - start < most;) measure(fresh.pop());
    if (fresh.length) soon();
    note(document.documentElement, "replay-media", FEATURES.filter((f) => matchMedia(`(${f})`).matches).join(" "));
    if (news.size) rest(IDLE_LOOK_MS);
    send();
    cost = performance.now() - begun;
  }

  // CSS's own animations run by themselves in the replay.
  function noteMotion(animation, moving) {
    const { effect, timeline, currentTime, playbackRate, playState } = animation;
    const el = effect && effect.target;
    if (!el || "animationName" in animation || "transitionProperty" in animation || effect.pseudoElement) return;
    if (timeline !== el.ownerDocument.timeline || typeof currentTime !== "number") return;
    if (!moving.has(el)) moving.set(el, []);
    moving.get(el).push({ keyframes: effect.getKeyframes(), timing: effect.getTiming(), at: Math.round(currentTime),
      rate: playbackRate, paused: playState === "paused" });
  }

  // rrweb sees adoptedStyleSheets set, not pushed to, and not of a root that comes back.
  function noteAdopted(root) {
    const sheets = root.adoptedStyleSheets, before = worn.get(root);
    if (!sheets || !before || sheets.length === before.length && before.every((s, i) => s === sheets[i])) return;
    worn.set(root, [...sheets]);
    root.adoptedStyleSheets = [...sheets]; // rrweb emits here
  }

  // Boxes.

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) fresh.push(target);
    soon();
  });

  function noteSize(el) {
    const { offsetWidth: width, offsetHeight: height } = el;
    if (width && height) note(el, "replay-size", `${width} ${height}`);
  }

  function measure(el) {
    if (el.localName === "iframe") {
      note(el, "replay-foreign", el.contentDocument ? null : "");
    } else if (BOXES.test(el.localName) || el.type === "image") {
      if (/^data:/.test(el.currentSrc || el.src || "")) return;
      noteSize(el);
      if (el.localName === "img" && String(options.inlineImages) === "true") noteImage(el);
    } else if (isIcon(el)) {
      icons.add(el);
      noteSize(el);
    } else if (isClosed(el)) {
      note(el, "replay-closed", "");
      noteSize(el);
    }
  }

  // noteImage copies a picture in the size that it is shown in. rrweb's own way
  // loses those that load later, and loads others anew.
  function noteImage(img) {
    const { currentSrc, naturalWidth, naturalHeight } = img;
    if (!img.complete || !naturalWidth || secrecy(img, new Map())) return;
    if ((copies.get(img) || {}).src !== currentSrc) {
      const canvas = document.createElement("canvas");
      const scale = Math.min(1, img.offsetWidth * devicePixelRatio / naturalWidth || 1);
      canvas.width = naturalWidth * scale, canvas.height = naturalHeight * scale;
      let url = null;
      try {
        canvas.getContext("2d").drawImage(img, 0, 0, canvas.width, canvas.height);
        url = canvas.toDataURL("image/webp", 0.8);
      } catch { /* of another origin, which does not allow it */ }
      copies.set(img, { src: currentSrc, url });
    }
    note(img, "replay-image", copies.get(img).url, currentSrc);
  }

  const content = (el, pseudo) => getComputedStyle(el, pseudo).content;

  function isIcon(el) {
    const text = el.textContent;
    if (ICON.test(text)) return true;
    if (text === "") return ICON.test(content(el, "::before") + content(el, "::after"));
    return ICON_FONT.test(getComputedStyle(el).fontFamily);
  }

  // An empty element has no height of its own, unless there is something in it
  // that nobody sees.
  function isClosed(el) {
    if (!HOSTS.test(el.localName) || el.firstChild || el.shadowRoot || !el.offsetHeight) return false;
    const map = el.computedStyleMap && el.computedStyleMap();
    if (!map || ["height", "min-height", "aspect-ratio"].some((name) => !/^(auto|0px)$/.test(map.get(name)))) return false;
    const { paddingTop, paddingBottom, position } = getComputedStyle(el);
    if (el.clientHeight <= parseFloat(paddingTop) + parseFloat(paddingBottom) || !/static|relative/.test(position)) return false;
    return !/flex|grid/.test(getComputedStyle(el.parentElement || el).display)
      && content(el, "::before") === "none" && content(el, "::after") === "none";
  }

  // Style sheets.

  const fill = (css, el) => css.replace(EMPTY, (_, before, name) => `${before}${name}: ${getComputedStyle(el).getPropertyValue(name)}`);

  // repair fills in what an element has that the rule is for, if there is one.
  function repair(css, rules, root) {
    for (const rule of rules) {
      const own = rule.style ? rule.style.cssText : "";
      const el = BROKEN.test(own) && rule.selectorText && root.querySelector(rule.selectorText);
      if (el) css = css.replace(own, () => fill(own, el));
      if (rule.cssRules) css = repair(css, rule.cssRules, root);
    }
    return css;
  }

  // sourceOf is a style element's own text, if that is all there is in its sheet.
  function sourceOf(el) {
    const copy = new CSSStyleSheet(), text = el.textContent;
    copy.replaceSync(text);
    const { cssRules } = el.sheet;
    return copy.cssRules.length === cssRules.length && [...copy.cssRules].every((r, i) => r.cssText === cssRules[i].cssText) && text;
  }

  const absolute = (css, base) => css.replace(/url\(\s*(["']?)(?!["']?(?:#|[a-z]+:))([^"')]+)\1\s*\)/gi, (all, _, path) => {
    try { return `url("${new URL(path, base).href}")`; } catch { return all; }
  });

  // textOf is a sheet as text, with what it imports; it throws if that may not be read.
  const textOf = (sheet) => [...sheet.cssRules].map((rule) =>
    (rule.styleSheet ? imported(rule, textOf(rule.styleSheet)) : absolute(rule.cssText, sheet.href || document.baseURI))).join("\n");

  function imported({ media, layerName, supportsText }, css) {
    if (layerName != null) css = `@layer ${layerName}{${css}}`;
    if (supportsText) css = `@supports ${supportsText}{${css}}`;
    return media.length ? `@media ${media.mediaText}{${css}}` : css;
  }

  // readSheet tells of a sheet that rrweb has not read: a new one, or a shadow root's.
  function readSheet(link) {
    read.set(link, link.href);
    try { note(link, "_cssText", textOf(link.sheet)); } catch { fetchSheet(link); }
    soon();
  }

  // fetchSheet reads again, from the browser's cache, a sheet whose own text is
  // broken, or that its server lets everybody read though the link did not ask.
  function fetchSheet(link, isBroken) {
    const { href } = link;
    if (!sources.has(href)) sources.set(href, fetch(href).then((answer) => (answer.ok ? answer.text() : Promise.reject(answer.status))));
    sources.get(href).then((css) => {
      if (link.href !== href || isBroken && /@import/i.test(css)) return; // a repaired text has its imports
      note(link, "_cssText", absolute(css, href));
      soon();
    }).catch(() => {
      if (!isBroken) note(link, "replay-missing", "");
      soon();
    });
  }

  function mendSheet(el, attributes) {
    const css = attributes._cssText;
    if (el.localName === "link") {
      if (css) read.set(el, el.href);
      if (!css && el.sheet) readSheet(el); // otherwise loaded() will see it
      if (css && BROKEN.test(css)) fetchSheet(el, true);
    }
    if (!css) return;
    // rrweb takes what is imported for some media, or into a layer, for all.
    if (el.sheet && [...el.sheet.cssRules].some((r) => r.styleSheet && imported(r, "") !== "")) {
      try { attributes._cssText = textOf(el.sheet); } catch { /* not all may be read */ }
    }
    if (!BROKEN.test(css)) return;
    const source = el.localName === "style" && sourceOf(el);
    attributes._cssText = source ? absolute(source, el.baseURI) : repair(css, el.sheet.cssRules, el.getRootNode());
  }

  // loaded sees a link's new sheet; rrweb tells of a link's first one.
  function loaded({ target }) {
    if (target.localName === "iframe") fresh.push(target), soon();
    if (target.localName === "link" && target.sheet) setTimeout(safe(() => {
      if (read.get(target) !== target.href && target.sheet) readSheet(target);
    }));
  }

  function mendStyle(el, attributes) {
    const { style } = attributes;
    if (typeof style === "string") attributes.style = fill(style, el);
    else for (const name in style) {
      if (!style[name] && [...el.style].includes(name)) style[name] = getComputedStyle(el).getPropertyValue(name);
    }
  }

  // What comes.

  function enter(root) {
    if (!root) return;
    roots.add(root);
    if (root.adoptedStyleSheets) worn.set(root, met.has(root) && root.host ? [] : [...root.adoptedStyleSheets]);
    met.add(root);
    on(root, "load", loaded, true);
  }

  function meet(serialized, isNew) {
    for (const open = [serialized]; open.length;) {
      const s = open.pop(), node = nodeOf(s.id), { attributes } = s;
      if (!node) continue;
      if (isNew) told.delete(node);
      if (s.type === 0) enter(node);
      if (s.isShadowHost) enter(node.shadowRoot);
      if (s.isShadow && !roots.has(node.parentNode)) enter(node.parentNode);
      if (attributes) meetElement(node, s);
      else if (ICON.test(s.textContent)) fresh.push(node.parentElement);
      for (const child of s.childNodes || []) open.push(child);
    }
  }

  function meetElement(el, { tagName, attributes }) {
    if (tagName === "style" || tagName === "link") mendSheet(el, attributes);
    if (attributes.style) mendStyle(el, attributes);
    if (BOXES.test(tagName) || attributes.type === "image") sizes.observe(el);
    if (attributes.rr_dataURL && secrecy(el, new Map())) delete attributes.rr_dataURL;
    if (!el.firstElementChild && (HOSTS.test(tagName) || OTHERS.test(tagName))) fresh.push(el);
  }

  function complete({ type, data }) {
    if (type === FULL) {
      roots.clear();
      told = new Map();
      meet(data.node);
    } else if (type === INCREMENTAL && data.source === MUTATION && !sending) {
      for (const add of data.adds) meet(add.node, true);
      for (const { id, attributes } of data.attributes) if (nodeOf(id)) {
        if (attributes._cssText) mendSheet(nodeOf(id), attributes);
        if (attributes.style) mendStyle(nodeOf(id), attributes);
      }
    } else if (type === INCREMENTAL && data.source === CANVAS) {
      if (secrecy(nodeOf(data.id), new Map())) data.commands = []; // masked
    } else if (type === INCREMENTAL && data.source === ADOPTED) {
      const root = nodeOf(data.id).shadowRoot || nodeOf(data.id);
      worn.set(root, [...root.adoptedStyleSheets]);
      for (const { rules } of data.styles || []) for (const r of rules) {
        if (BROKEN.test(r.rule)) for (const sheet of root.adoptedStyleSheets) r.rule = repair(r.rule, sheet.cssRules, root);
      }
    }
  }

  function took({ type }) {
    if (type === FULL) look(); // a part of the same moment
    else if (type === INCREMENTAL && !sending) soon();
  }

  // begin goes on until listeners are aborted.
  function begin() {
    for (const f of FEATURES) on(matchMedia(`(${f})`), "change", soon);
    on(document.fonts, "loadingdone", safe(() => {
      for (const el of icons) if (el.isConnected) fresh.push(el); else icons.delete(el);
      soon();
    }));
    rest(IDLE_LOOK_MS);
    listeners.signal.addEventListener("abort", () => {
      for (const id of [idle, timer]) clearTimeout(id);
      timer = 0;
      sizes.disconnect();
      roots.clear();
    });
  }

  return { begin, look, complete, took };
})();
