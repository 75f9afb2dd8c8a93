// "What happened": a list of moments beside the picture and marks on the time
// line below it. Both are filled as moments are told; the list follows the play
// head.

import { clock, count, el } from './api.js';

const LINES = 5000, MARKS = 2000; // more than anyone reads, or can tell apart
const NEAR_PX = 12; // this far from a mark the pointer means it
const STACK_TIMES = 50;

const GROUPS = { navigation: 'Pages', click: 'Clicks', input: 'Inputs', event: 'Events', error: 'Errors' };
const VERBS = { navigation: 'Went to', click: 'Clicked', input: 'Typed in', event: '', error: '', gap: '', visibility: '' };
const MARKED = ['navigation', 'click', 'event', 'error', 'gap', 'idle'];

const sign = () => el('i', { className: 'sign', ariaHidden: 'true' });
const look = (m) => `${m.kind}${m.rage ? ' rage' : ''}${m.dead ? ' dead' : ''}`;

export class Panel {
  // nodes: {lines, filters, nothing, marks, timeline, seek, tip}; go(time) is
  // called for what is chosen.
  constructor(nodes, go) {
    Object.assign(this, nodes, { go });
    this.moments = new Map(); // by key: {…, line, button, mark}
    this.order = []; // those that have a line, by time
    this.buttons = new Map(); // filters, by kind
    this.shown = 'all';
    this.start = 0;
    this.length = 1;
    this.addFilter('all', 'All');
    this.timeline.addEventListener('pointermove', (e) => this.point(e));
    this.timeline.addEventListener('pointerleave', () => { this.tip.hidden = true; });
    this.timeline.addEventListener('click', (e) => {
      const mark = this.near(e);
      if (mark) this.go(mark.time);
    });
  }

  // add takes a moment, or what is new about one. The first page is where the
  // recording began, or where somebody began to watch it.
  add(moment) {
    const known = this.moments.get(moment.key);
    if (!known && this.moments.size >= 2 * LINES) return null;
    const m = Object.assign(known ?? {}, moment);
    this.moments.set(m.key, m);
    const listed = m.kind in VERBS && !m.again && !(m.first && m.time > this.start + 1000);
    if (listed && (m.line || this.order.length < LINES)) this.write(m);
    if (MARKED.includes(m.kind) && !m.first && (m.mark || this.marks.childElementCount < MARKS)) this.place(m);
    return m;
  }

  // The list.

  write(m) {
    if (!m.line) {
      m.button = el('button', { onclick: () => this.go(m.time) });
      m.line = el('li', {}, m.button);
      const at = this.order.findLastIndex((other) => other.time <= m.time) + 1;
      this.lines.insertBefore(m.line, this.order[at]?.line ?? null);
      this.order.splice(at, 0, m);
    }
    m.line.className = look(m);
    m.line.hidden = !this.shows(m);
    m.button.replaceChildren(el('time', { textContent: clock(m.time - this.start) }), sign(), el('span', { className: 'words' }, ...this.words(m)));
    if (m.kind === 'error' && (m.detail || m.n > 1)) this.explain(m);
    this.changed = true;
  }

  shows(m) { return this.shown === 'all' || this.shown === m.kind; }

  words(m) {
    const verb = m.first ? 'Began on' : m.chosen ? 'Chose in' : VERBS[m.kind];
    const tag = (text, title) => el('span', { className: 'tag', textContent: text, title });
    return [
      verb && `${verb} `, el(m.kind === 'event' ? 'code' : 'b', { textContent: m.text }),
      ' ',
      m.n > 1 && tag(`×${m.n}`, `${m.n} times`),
      m.rage && tag('rage click', 'Three times and more within a second'),
      m.dead && tag('dead click', 'Nothing changed for three seconds'),
      (m.title || m.kind === 'event') && el('small', { textContent: m.title || m.detail }),
    ].filter(Boolean);
  }

  // explain puts an error's stack below its line, and the times it came again.
  explain(m) {
    const again = [...this.moments.values()].filter((other) => other.again === m.key).slice(0, STACK_TIMES);
    m.stack ??= m.line.appendChild(el('details'));
    m.stack.replaceChildren(el('summary', { textContent: m.n > 1 ? 'Stack and times' : 'Stack' }),
      el('pre', { textContent: m.detail || 'No stack was sent.' }),
      ...again.map(({ time }) => el('button', { textContent: clock(time - this.start), onclick: () => this.go(time) })));
  }

  addFilter(kind, name) {
    const button = el('button', { className: kind, onclick: () => this.filter(kind) }, sign(), name, el('span'));
    button.setAttribute('aria-pressed', kind === this.shown);
    this.buttons.set(kind, button);
    this.filters.replaceChildren(...['all', ...Object.keys(GROUPS)].map((k) => this.buttons.get(k)).filter(Boolean));
    return button;
  }

  filter(kind) {
    this.shown = kind;
    for (const [name, button] of this.buttons) button.setAttribute('aria-pressed', name === kind);
    for (const m of this.order) m.line.hidden = !this.shows(m);
    this.now = undefined;
  }

  tally() {
    this.changed = false;
    this.nothing.hidden = this.order.length > 0;
    const sums = {};
    for (const m of this.order) sums[m.kind] = (sums[m.kind] ?? 0) + (m.n ?? 1);
    for (const [kind, name] of Object.entries(GROUPS)) {
      if (sums[kind]) (this.buttons.get(kind) ?? this.addFilter(kind, name)).lastChild.textContent = ` ${count(sums[kind])}`;
    }
  }

  // The play head.

  // head marks the line at the play head. The list does not move under a pointer
  // or the keyboard's focus.
  head(time) {
    const { changed } = this;
    if (changed) this.tally();
    const now = this.order.findLast((m) => m.time <= time && this.shows(m));
    if (now === this.now && !changed) return;
    this.now?.button.removeAttribute('aria-current');
    now?.button.setAttribute('aria-current', 'true');
    this.now = now;
    const { lines } = this;
    if (now && !lines.matches(':hover') && !lines.contains(document.activeElement)) {
      lines.scrollTop = now.line.offsetTop - lines.clientHeight / 3;
    }
  }

  // step goes to the line after the play head, or to the one before.
  step(by) {
    const lines = this.order.filter((m) => this.shows(m));
    const to = lines[Math.max(lines.indexOf(this.now) + by, 0)];
    if (to) this.go(to.time);
  }

  pageAt(time) {
    let page;
    for (const m of this.moments.values()) {
      if (m.kind === 'navigation' && m.time <= time && m.time >= (page?.time ?? -Infinity)) page = m;
    }
    return page;
  }

  spanAt(kind, time) {
    for (const m of this.moments.values()) if (m.kind === kind && m.time <= time && time < m.to) return m;
    return undefined;
  }

  // The time line.

  measure(start, length) {
    this.length = length || 1;
    this.marks.style.setProperty('--length', this.length);
    if (start === this.start || start === null) return;
    this.start = start;
    for (const m of [...this.moments.values()]) this.add(m);
  }

  place(m) {
    m.mark ??= this.marks.appendChild(el('span'));
    m.mark.className = look(m);
    m.mark.style.setProperty('--at', m.time - this.start);
    if (m.to) m.mark.style.setProperty('--for', m.to - m.time);
  }

  // near is the mark that the pointer means, outside the slider.
  near({ clientX, target }) {
    if (target === this.seek) return undefined;
    const { left, width } = this.marks.getBoundingClientRect();
    const off = (m) => Math.abs(left + (width * (m.time - this.start)) / this.length - clientX);
    let best, least = NEAR_PX;
    for (const m of this.moments.values()) {
      if (m.mark && m.kind !== 'idle' && off(m) < least) [best, least] = [m, off(m)];
    }
    return best;
  }

  // point tells what is under the pointer: a mark, or the time.
  point(e) {
    const { left, width } = this.marks.getBoundingClientRect();
    const share = Math.min(Math.max((e.clientX - left) / width, 0), 1);
    const mark = this.near(e), time = mark?.time ?? this.start + share * this.length;
    const what = mark ?? this.spanAt('gap', time) ?? this.spanAt('idle', time);
    this.tip.textContent = `${clock(time - this.start)}  ${what ? `${VERBS[what.kind] ?? ''} ${what.text}` : ''}`.trim();
    this.tip.style.left = `${100 * share}%`;
    this.tip.hidden = false;
    this.timeline.classList.toggle('near', Boolean(mark));
  }
}
