// What a recorded page looked like, as far as rrweb does not know it: the tracker
// notes it in attributes named replay-… (see tracker-picture.js), and the picture
// follows them. One picture is one Replayer's, as its plugin.

import { isOpen } from './events.js';
import { FULL, INCREMENTAL, INPUT, MUTATION } from './story.js';
import { Styles } from './styles.js';

export const calm = matchMedia('(prefers-reduced-motion: reduce)'); // of who watches
const STYLE_RULE = 8, CANVAS = 9, STYLE_DECLARATION = 13, ADOPTED = 15;
const MOTIONS = 50; // of an element; a page has no more
const FULL_SCREEN = {
  position: 'fixed', inset: '0', width: '100%', height: '100%', margin: '0', 'z-index': '2147483647',
};
const IMAGE = /^data:image\/(webp|png|jpeg);base64,[\w+/=]*$/;
const LEFT_OUT = 'data:,left-out'; // stands for an address that was too large to be sent
const REPLACED = /^(IMG|VIDEO|CANVAS|OBJECT|EMBED|IFRAME|INPUT)$/;
const STARLESS = /^(date|datetime-local|month|number|time|week)$/; // inputs that refuse them
const isLeftOut = (node) => node.getAttribute('src') === LEFT_OUT;

// around gives an element and all that it is in, also out of shadow trees.
function* around(el) {
  for (; el; el = el.parentElement ?? el.getRootNode().host) if (el.nodeType === 1) yield el;
}

// drawing is a quiet box, as a picture.
function drawing(width, height, words) {
  const text = words.slice(0, 200).replace(/[^\p{L}\p{N}\p{P}\p{Zs}]/gu, ' ')
    .replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">`
    + '<rect width="100%" height="100%" fill="#888" fill-opacity=".15"/>'
    + '<rect width="100%" height="100%" fill="none" stroke="#888" stroke-opacity=".4" stroke-width="2"/>'
    + `<text x="8" y="20" font-family="system-ui, sans-serif" font-size="13" fill="#777">${text}</text></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

const WORDS = {
  CANVAS: 'canvas is not recorded', VIDEO: 'video is not recorded', OBJECT: 'not recorded', EMBED: 'not recorded',
  IFRAME: 'a page of another origin is not recorded', FORM: 'a form that cannot be recorded',
};

function words(node) {
  if (Object.hasOwn(WORDS, node.nodeName)) return WORDS[node.nodeName];
  if (node.hasAttribute('replay-closed')) return 'a closed shadow root is not recorded';
  return node.getAttribute('alt') || (isLeftOut(node) ? 'too large to be recorded' : '');
}

function setAll(node, styles) {
  for (const [name, value] of Object.entries(styles)) node.style.setProperty(name, value, 'important');
}

// fix gives an element the size that it had.
function fix(node, width, height) {
  const display = node.ownerDocument.defaultView.getComputedStyle(node).display;
  const isWord = display === 'inline' && !REPLACED.test(node.nodeName); // its height is its line's
  const exactly = (side, px) => ({ [side]: `${px}px`, [`min-${side}`]: `${px}px`, [`max-${side}`]: `${px}px` });
  if (display === 'inline') setAll(node, { display: 'inline-block' });
  setAll(node, { 'box-sizing': 'border-box', overflow: isWord ? 'visible' : 'hidden', ...exactly('width', width) });
  if (!isWord) setAll(node, exactly('height', height));
}

// drawBox draws what is not recorded, and a copy of what is.
function drawBox(node, width, height) {
  fix(node, width, height);
  const copy = node.getAttribute('replay-image') ?? '';
  const image = IMAGE.test(copy) ? copy : drawing(width, height, words(node));
  if (node.nodeName === 'IMG' || node.nodeName === 'INPUT') drawImage(node, image);
  else if (node.nodeName === 'VIDEO' && !isOpen(node.getAttribute('poster'))) node.setAttribute('poster', image);
  else if (node.nodeName !== 'VIDEO') drawBehind(node, image);
}

function drawImage(node, image) {
  const { src, srcset } = node.attributes;
  if (isOpen(src?.value) || isOpen(srcset?.value.trim().split(/[\s,]/)[0])) return; // it is loaded
  if (src?.value.startsWith('data:') && !isLeftOut(node) && !IMAGE.test(image)) return; // the recording holds it
  node.removeAttribute('srcset');
  for (const source of node.closest('picture')?.querySelectorAll('source') ?? []) source.removeAttribute('srcset');
  node.setAttribute('src', image);
}

function drawBehind(node, image) {
  setAll(node, { 'background-image': `url("${image}")`, 'background-position': '0 0', 'background-size': '100% 100%' });
  if (!REPLACED.test(node.nodeName)) setAll(node, { color: 'transparent', 'white-space': 'nowrap' });
}

// frameOf is what rrweb's recorder sends of a canvas: a picture, to be drawn on it.
function frameOf({ commands }) {
  const bitmap = commands?.find((c) => c?.property === 'drawImage')?.args?.[0];
  const blob = bitmap?.args?.[0];
  return `data:${blob?.type};base64,${blob?.data?.[0]?.base64}`;
}

// A font that the viewer may load draws its icons itself.
const family = (style) => style.fontFamily.split(',')[0].replace(/"/g, '');
async function drawIcon(node, width, height) {
  const { fonts, defaultView: view } = node.ownerDocument;
  const used = [null, '::before', '::after'].map((part) => family(view.getComputedStyle(node, part)));
  const faces = [...fonts].filter((face) => used.includes(family({ fontFamily: face.family })));
  await Promise.any(faces.map((face) => face.load()))
    .catch(() => { if (node.isConnected) drawBox(node, width, height); });
}

// pointInside makes the page's own address with a fragment a fragment alone:
// here the page has another address.
function pointInside(use) {
  for (const attribute of use.attributes) {
    const [address, id] = attribute.value.split('#');
    const isInside = /href$/.test(attribute.name) && address && id && use.getRootNode().getElementById(id);
    if (isInside) attribute.value = `#${id}`;
  }
}

// What a control holds that takes no stars: its letters are drawn as dots.
const STANDS_FOR = { date: '2000-01-01', 'datetime-local': '2000-01-01T00:00', month: '2000-01', time: '00:00',
  week: '2000-W01' };

// fill shows in such a control that it holds something.
function fill(control) {
  const text = control.getAttribute('value') ?? '';
  if (!/^\*+$/.test(text)) return;
  control.value = STANDS_FOR[control.type] ?? '0'.repeat(text.length);
  setAll(control, { '-webkit-text-security': 'disc' });
}

// choose shows in a select that something is chosen, where nobody may see what.
function choose(select) {
  const text = select.getAttribute('value') ?? '';
  if (!/^\*+$/.test(text) || select.value === text || select.type !== 'select-one') return;
  // No wider than what it offers.
  const longest = Math.max(1, ...Array.from(select.options, (option) => option.text.length));
  const shown = text.slice(0, longest);
  const chosen = Object.assign(select.ownerDocument.createElement('option'), { value: text, text: shown });
  select.append(chosen);
  chosen.selected = true;
}

export class Picture {
  // onMissing is told how many style sheets are missing, when that changes.
  constructor(onMissing, onBroken) {
    this.onMissing = onMissing;
    this.onBroken = onBroken;
    this.reset();
  }

  // reset comes before each full snapshot.
  reset() {
    this.styles = new Styles();
    this.roots = new Set();
    this.missing = new Set(); // links whose sheet could not be recorded
    this.motions = new Map(); // element → animations
    this.dirty = new Set(); // sheets to be rewritten
    this.news = new Set(); // elements whose attributes are to be followed
    this.hovered = [];
    this.focused = [];
  }

  // The Replayer's plugin.

  onBuild(node) {
    const root = node?.getRootNode(), el = node?.nodeType === 3 ? node.parentElement : node;
    if (root?.getAnimations && root.nodeType !== 1) this.roots.add(root); // no detached node
    if (el?.nodeType === 1) this.news.add(el);
    this.soon();
  }

  handler({ type, data }, isSync, { replayer }) {
    if (type === INCREMENTAL) this.take(data, replayer.getMirror(), replayer.styleMirror);
    if (type === INCREMENTAL || type === FULL) this.soon(isSync);
  }

  take(data, mirror, sheets) {
    const { source, styleId } = data, node = mirror.getNode(data.id);
    if (source === MUTATION) {
      for (const { id } of [...(data.attributes ?? []), ...(data.texts ?? [])]) this.onBuild(mirror.getNode(id));
    } else if (source === STYLE_RULE || source === STYLE_DECLARATION) {
      this.dirty.add(styleId ? sheets.getStyle(styleId) : node);
    } else if (source === ADOPTED) {
      for (const style of data.styles ?? []) this.dirty.add(sheets.getStyle(style.styleId));
    } else if (source === INPUT && (node?.nodeName === 'SELECT' || STARLESS.test(node?.type))) {
      node.setAttribute('value', data.text);
      this.onBuild(node);
    } else if (source === CANVAS && node?.nodeName === 'CANVAS') {
      const image = frameOf(data);
      if (IMAGE.test(image)) node.setAttribute('replay-image', image);
      this.onBuild(node);
    }
  }

  // soon comes before the browser paints: events are applied many at a time.
  soon(isSync = false) {
    this.leapt ||= isSync;
    if (!this.isDue) queueMicrotask(() => this.follow());
    this.isDue = true;
  }

  follow() {
    const { dirty, news, styles } = this;
    Object.assign(this, { dirty: new Set(), news: new Set(), isDue: false });
    const each = (things, f) => {
      for (const thing of things) if (thing && thing.isConnected !== false) try { f(thing); } catch { this.onBroken(); }
    };
    each(news, (node) => {
      if (node.hasAttribute('replay-media')) styles.setMedia(node.getAttribute('replay-media'));
    });
    each([...dirty, ...news], (owner) => styles.rewrite(owner));
    each(news, (node) => this.followNode(node));
    if (this.leapt || calm.matches) this.settle();
    this.leapt = false;
    const missing = [...this.missing].filter((link) => link.isConnected).length;
    if (missing !== this.told) this.onMissing(this.told = missing);
  }

  followNode(node) {
    const states = (node.getAttribute('replay-state') ?? '').split(' ');
    const has = (state) => states.includes(state);
    if (node.nodeName === 'STYLE' && node.disabled !== has('disabled')) node.disabled = has('disabled');
    if (node.nodeName === 'LINK' && node.hasAttribute('replay-missing')) this.missing.add(node);
    if (node.nodeName === 'SELECT') choose(node);
    if (node.nodeName === 'use') pointInside(node);
    if (STARLESS.test(node.type)) fill(node);
    if (node.type === 'checkbox') node.indeterminate = has('indeterminate');
    if (node.popover && has('popover-open') !== node.matches(':popover-open')) node.togglePopover();
    if (has('fullscreen')) setAll(node, FULL_SCREEN);
    if (has('focus') !== (this.focused[0] === node)) this.focus(has('focus') ? node : null);
    this.followSize(node);
    if (node.hasAttribute('replay-motion') || this.motions.has(node)) this.followMotion(node);
  }

  followSize(node) {
    const [, width, height] = /^(\d{1,5}) (\d{1,5})$/.exec(node.getAttribute('replay-size') ?? '') ?? [];
    const { offsetWidth, offsetHeight } = node;
    const draw = REPLACED.test(node.nodeName) || node.hasAttribute('replay-closed') ? drawBox : drawIcon;
    if (width) draw(node, Number(width), Number(height));
    else if (isLeftOut(node)) drawBox(node, Math.max(offsetWidth, 180), Math.max(offsetHeight, 32)); // nobody knows it
    else if (node.matches('iframe[replay-foreign], form[data-replay-left-out]')) {
      drawBehind(node, drawing(offsetWidth, offsetHeight, words(node)));
    }
  }

  // mark gives an attribute to an element and to all around it.
  mark(name, el, before) {
    for (const old of before) old.removeAttribute(name);
    const now = el ? [...around(el)] : [];
    for (const each of now) each.setAttribute(name, '');
    return now;
  }

  hover(el) { this.hovered = this.mark('replay-hover', el, this.hovered); }
  focus(el) { this.focused = this.mark('replay-focus-within', el, this.focused); }

  followMotion(node) {
    for (const animation of this.motions.get(node) ?? []) animation.cancel();
    this.motions.delete(node);
    const animations = [];
    try {
      const recorded = JSON.parse(node.getAttribute('replay-motion') ?? '[]').slice(0, MOTIONS);
      for (const { keyframes, timing, at, rate, paused } of recorded) {
        const animation = node.animate(keyframes, { ...timing, iterations: timing.iterations ?? Infinity });
        Object.assign(animation, { playbackRate: rate, currentTime: at });
        if (paused) animation.pause();
        animations.push(animation);
      }
    } catch { /* it is no animation */ }
    if (animations.length) this.motions.set(node, animations);
  }

  get animations() { return [...this.roots].flatMap((root) => root.getAnimations()); }

  // settle shows the end of what began before the moment that was sought, or of all
  // for whoever wants no motion.
  settle() {
    for (const animation of this.animations) {
      if (animation.playState === 'paused' && !('animationName' in animation)) continue; // by the page
      try { animation.finish(); } catch { if (calm.matches) animation.pause(); } // it has no end
    }
  }
}
