// The part of the tracker that notes what the picture needs and rrweb does not
// record. tracker-record.js calls picture.complete() with each event before it is
// cleaned, and picture.took() after it was pushed; tracker-privacy.js calls
// picture.meet() with each node in it. The notes are attributes, and travel as rrweb's
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
  const BOXES = /^(img|video|canvas|object|embed)$/;
  const HOSTS = /-|^(article|aside|div|footer|header|main|nav|p|section|span)$/; // a shadow root can be closed there
  const OTHERS = /^(img|input|video|canvas|object|embed|iframe|b|em|i)$/; // have a box, or an icon
  const ICON = /[\ue000-\uf8ff]/; // private use
  const ICON_FONT = /^[^,]*(icon|symbol|awesome|glyph)/i; // draws words
  const STATES = ["popover-open", "fullscreen", "focus", "focus-visible", "target", "indeterminate",
    "invalid", "user-invalid", "user-valid"]
    .filter((state) => CSS.supports(`selector(:${state})`));
  // Elements that may be in one of them, or undefined, beside what has the focus and the
  // like. To ask all elements of a large page would take a tenth of a second.
  const MAY_HAVE = /-|^(style|link|input|select|textarea|button|output|fieldset|form|object|progress)$/;
  const FEATURES = [["prefers-color-scheme", "light dark"], ["prefers-reduced-motion", "no-preference reduce"],
    ["prefers-contrast", "no-preference more less custom"], ["hover", "none hover"], ["any-hover", "none hover"],
    ["pointer", "none coarse fine"], ["any-pointer", "none coarse fine"],
  ].flatMap(([name, values]) => values.split(" ").map((value) => `${name}:${value}`));
  const asks = FEATURES.map((feature) => matchMedia(`(${feature})`));
  const LOOK_MS = 100, LAST_LOOK_MS = 30000;
  const MEASURE_MS = 10; // of the elements in one look
  const SHARE = 20; // the pause between two looks is at least so many times the time of one, up to a second
  // A browser's own text of a shorthand with var(), of which a longhand is set later.
  const BROKEN = /(^|[^\w-])(?!--)([a-z-]+): (?=;)/, EMPTY = new RegExp(BROKEN, "g");

  const roots = new Set(); // documents and shadow roots that are recorded
  const worn = new WeakMap(); // root → its adopted sheets, as they were recorded
  const read = new WeakMap(); // link → the address whose sheet is recorded
  const sources = new Map(); // address → what fetch made of it
  const copies = new WeakMap(); // img → {src, url}
  const asked = new Set(); // elements that may have a state
  const plain = new Set(); // classes of empty elements that are no icons, since the last full snapshot
  let told = new Map(); // element → {attribute: what was told of it} since the last full snapshot
  let news = new Map(); // element → {attribute: value}, to be sent
  let fresh = []; // elements whose box is to be looked at
  let timer = 0, pause = LOOK_MS, cost = 0; // ms: until the next look; of the last one
  let sending = false;

  // What is told.

  function note(el, name, value, key = value) {
    if (record.mirror.getId(el) < 1) return;
    const known = told.get(el) || {};
    if ((name in known ? known[name] : null) === key) return;
    told.set(el, { ...known, [name]: key });
    news.set(el, { ...news.get(el), [name]: value });
  }

  function send() {
    const all = Array.from(news, ([el, attributes]) => ({ id: record.mirror.getId(el), attributes }));
    const attributes = all.filter(({ id }) => id > 0);
    news = new Map();
    if (!attributes.length) return;
    sending = true;
    emit({ type: INCREMENTAL, data: { source: MUTATION, texts: [], removes: [], adds: [], attributes } });
    sending = false;
  }

  // A look follows each event. More come after it, less and less often and in the end
  // no more, for what no event tells: a new title, sheet.disabled = true and the like.
  const soon = () => lookIn(LOOK_MS);
  function lookIn(ms) {
    if (timer && pause <= ms) return;
    clearTimeout(timer);
    pause = ms;
    timer = setTimeout(safe(look), Math.max(ms, Math.min(SHARE * cost, 1000)));
  }

  function look(most = MEASURE_MS) {
    const begun = performance.now();
    clearTimeout(timer);
    timer = 0;
    noteMissed();
    const moving = new Map();
    for (const root of roots) {
      if (!(root.host ? root.isConnected : root.defaultView)) { roots.delete(root); continue; }
      for (const el of distinguished(root)) asked.add(el);
      for (const a of root.getAnimations ? root.getAnimations() : []) noteMotion(a, moving);
      noteAdopted(root);
    }
    for (const el of asked) {
      if (el.isConnected) note(el, "replay-state", stateOf(el) || null);
      else asked.delete(el);
    }
    for (const el of told.keys()) if (told.get(el)["replay-motion"] && !moving.has(el)) note(el, "replay-motion", null);
    for (const [el, list] of moving) {
      const apart = list.map((motion) => ({ ...motion, at: motion.paused && motion.at })); // from time, that goes on
      note(el, "replay-motion", stringify(list), stringify(apart));
    }
    for (const start = performance.now(); fresh.length && performance.now() - start < most;) measure(fresh.pop());
    if (fresh.length) soon();
    note(document.documentElement, "replay-media", FEATURES.filter((_, i) => asks[i].matches).join(" "));
    const next = news.size ? 10 * LOOK_MS : 4 * pause;
    send();
    cost = performance.now() - begun;
    if (next < LAST_LOOK_MS) lookIn(next);
  }

  function distinguished(root) {
    const focus = root.host ? root.activeElement : focusOf(root), all = focus ? [focus] : [];
    if (document.fullscreenElement) all.push(...root.querySelectorAll(":fullscreen"));
    if (root.location && root.location.hash) all.push(...root.querySelectorAll(":target"));
    return all;
  }

  function stateOf(el) {
    if (/^(style|link)$/.test(localName(el))) return el.disabled || el.sheet && el.sheet.disabled ? "disabled" : "";
    if (!matches(el, ":defined")) return "undefined";
    return STATES.filter((state) => matches(el, ":" + state)).join(" ");
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

  // rrweb sees adoptedStyleSheets set, not pushed to.
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
    if (!img.complete || !naturalWidth || secrecy(img)) return;
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
    const text = el.textContent, name = el.className;
    if (ICON.test(text)) return true;
    if (text !== "") return ICON_FONT.test(getComputedStyle(el).fontFamily);
    if (plain.has(name)) return false;
    if (ICON.test(content(el, "::before") + content(el, "::after"))) return true;
    if (name) plain.add(name);
    return false;
  }

  // An empty element has no height of its own, unless there is something in it
  // that nobody sees.
  function isClosed(el) {
    if (!HOSTS.test(el.localName) || el.firstChild || el.shadowRoot || !el.offsetHeight) return false;
    const map = el.computedStyleMap && el.computedStyleMap();
    const isAuto = (name) => /^(auto|0px)$/.test(map.get(name));
    if (!map || !["height", "min-height", "aspect-ratio"].every(isAuto)) return false;
    const { paddingTop, paddingBottom, position } = getComputedStyle(el);
    if (el.clientHeight <= parseFloat(paddingTop) + parseFloat(paddingBottom)) return false;
    return /static|relative/.test(position) && !/flex|grid/.test(getComputedStyle(el.parentElement || el).display)
      && content(el, "::before") === "none" && content(el, "::after") === "none";
  }

  // Style sheets.

  const valueOf = (el, name) => getComputedStyle(el).getPropertyValue(name);
  const fill = (css, el) => css.replace(EMPTY, (_, before, name) => `${before}${name}: ${valueOf(el, name)}`);

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
    const rulesOf = (sheet) => Array.from(sheet.cssRules, (rule) => rule.cssText).join();
    copy.replaceSync(text);
    return rulesOf(copy) === rulesOf(el.sheet) && text;
  }

  const RELATIVE = /url\(\s*(["']?)(?!["']?(?:#|[a-z]+:))([^"')]+)\1\s*\)/gi;
  const absolute = (css, base) => css.replace(RELATIVE, (all, _, path) => {
    try { return `url("${new URL(path, base).href}")`; } catch { return all; }
  });

  // textOf is a sheet as text, with what it imports; it throws if that may not be read.
  const textOf = ({ href, cssRules }) => Array.from(cssRules, (rule) => (rule.styleSheet
    ? imported(rule, textOf(rule.styleSheet)) : absolute(rule.cssText, href || document.baseURI))).join("\n");

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
    const textIn = (answer) => (answer.ok ? answer.text() : Promise.reject(answer.status));
    if (!sources.has(href)) sources.set(href, fetch(href).then(textIn));
    sources.get(href).then((css) => {
      if (link.href !== href || isBroken && /@import/i.test(css)) return; // a repaired text has its imports
      note(link, "_cssText", absolute(css, href));
    }).catch(() => {
      if (!isBroken) note(link, "replay-missing", "");
    }).then(soon);
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

  // loaded sees a link's new sheet, and what a style element imports, when that has
  // come; rrweb tells of a link's first one.
  function loaded({ target }) {
    if (target.localName === "iframe") fresh.push(target), soon();
    if (target.localName === "link" && target.sheet) setTimeout(safe(() => {
      if (read.get(target) !== target.href && target.sheet) readSheet(target);
    }));
    if (target.localName === "style" && target.sheet && [...target.sheet.cssRules].some((r) => r.styleSheet)) {
      safe(tellText, () => {})(target);
    }
  }

  // tellText makes the text of a style element what is in its sheet.
  function tellText(style) {
    const css = textOf(style.sheet); // throws if not all may be read
    const texts = [...style.childNodes].map((node, i) => ({ id: record.mirror.getId(node), value: i ? "" : css }));
    const known = texts.filter(({ id }) => id > 0);
    emit({ type: INCREMENTAL, data: { source: MUTATION, texts: known, removes: [], adds: [], attributes: [] } });
  }

  function mendStyle(el, attributes) {
    const { style } = attributes;
    if (typeof style === "string") attributes.style = fill(style, el);
    else for (const name in style) {
      if (!style[name] && [...el.style].includes(name)) style[name] = valueOf(el, name);
    }
  }

  // What comes.

  function enter(root) {
    if (!root) return;
    roots.add(root);
    // rrweb tells of a shadow root's adopted sheets once, not when it comes back.
    if (root.adoptedStyleSheets) worn.set(root, worn.has(root) && root.host ? [] : [...root.adoptedStyleSheets]);
    for (const type of ["load", "error"]) on(root, type, loaded, true); // error: some import has failed
  }

  // meet sees each node before it is cleaned.
  function meet(serialized, node) {
    const { type, attributes, isShadowHost, isShadow, textContent } = serialized;
    told.delete(node);
    if (type === 0) enter(node);
    if (isShadowHost) enter(node.shadowRoot);
    if (isShadow && !roots.has(node.parentNode)) enter(node.parentNode);
    if (attributes) meetElement(node, serialized);
    else if (ICON.test(textContent)) fresh.push(node.parentElement);
  }

  function meetElement(el, { tagName, attributes }) {
    if (MAY_HAVE.test(tagName) || "popover" in attributes) asked.add(el);
    if (tagName === "style" || tagName === "link") mendSheet(el, attributes);
    if (attributes.style) mendStyle(el, attributes);
    if (BOXES.test(tagName) || attributes.type === "image") sizes.observe(el);
    if (attributes.rr_dataURL && secrecy(el)) delete attributes.rr_dataURL;
    if ((HOSTS.test(tagName) || OTHERS.test(tagName)) && !el.firstElementChild) fresh.push(el);
  }

  function complete({ type, data }) {
    if (type === FULL) {
      roots.clear();
      asked.clear();
      plain.clear();
      told = new Map();
    } else if (type === INCREMENTAL && data.source === MUTATION && !sending) {
      for (const { id, attributes } of data.attributes) if (nodeOf(id)) {
        if ("popover" in attributes) asked.add(nodeOf(id));
        if (attributes._cssText) mendSheet(nodeOf(id), attributes);
        if (attributes.style) mendStyle(nodeOf(id), attributes);
      }
    } else if (type === INCREMENTAL && data.source === CANVAS) {
      if (secrecy(nodeOf(data.id))) data.commands = []; // masked
    } else if (type === INCREMENTAL && data.source === ADOPTED) {
      const root = nodeOf(data.id).shadowRoot || nodeOf(data.id);
      worn.set(root, [...root.adoptedStyleSheets]);
      for (const r of (data.styles || []).flatMap(({ rules }) => rules)) if (BROKEN.test(r.rule)) {
        for (const sheet of root.adoptedStyleSheets) r.rule = repair(r.rule, sheet.cssRules, root);
      }
    }
  }

  function took({ type }) {
    if (type === FULL) look(); // a part of the same moment
    else if (type === INCREMENTAL && !sending) soon();
  }

  // begin goes on until listeners are aborted.
  function begin() {
    for (const query of asks) on(query, "change", soon);
    on(document.fonts, "loadingdone", safe(() => { // icons have their widths now
      for (const [el, { "replay-size": size }] of told) if (size) fresh.push(el);
      soon();
    }));
    listeners.signal.addEventListener("abort", () => {
      clearTimeout(timer);
      timer = 0;
      sizes.disconnect();
      roots.clear();
    });
  }

  return { begin, look, complete, meet: safe(meet), took };
})();
