// "What happened": a list of moments beside the picture and marks on the time
// line below it. Both are filled as moments are told; the list follows the play
// head.

import { clock, count, el, write } from './api.js';

const MOMENTS = 5000; // more than anyone reads, or can tell apart
const STACK_TIMES = 50;
const SAME_MS = 50;
const VERBS = {
  navigation: 'Went to ', click: 'Clicked ', input: 'Typed in ', event: '', error: '', gap: '', visibility: '',
};
const MARKED = ['navigation', 'click', 'event', 'error', 'gap', 'idle'];

const look = (m) => `${m.kind}${m.rage ? ' rage' : ''}${m.dead ? ' dead' : ''}`;
const tag = (text, title) => el('span', { className: 'tag', textContent: text, title });

export class Panel {
  // go(time) is called for what is chosen.
  constructor({ lines, filters, nothing, marks }, go) {
    Object.assign(this, { lines, filters, nothing, marks, go });
    this.moments = new Map(); // by key: {…, line, button, mark}
    this.order = []; // those that have a line, by time
    this.shown = 'all'; // the kind of line, if not of all kinds
    this.start = null;
    for (const button of filters.children) button.onclick = () => this.filter(button.value);
  }

  // add takes a moment, or what is new about one. The first page is where the
  // recording began, or where somebody began to watch it.
  add(moment) {
    const known = this.moments.get(moment.key);
    if (!known && this.moments.size >= MOMENTS) return;
    const m = Object.assign(known ?? {}, moment);
    this.moments.set(m.key, m);
    if (m.kind in VERBS && !m.again && !(m.first && m.time > this.start + 1000)) this.list(m);
    if (MARKED.includes(m.kind) && !m.first) this.mark(m);
  }

  // The list.

  list(m) {
    if (!m.line) {
      m.button = el('button', { onclick: () => this.go(m.time) });
      m.line = el('li', {}, m.button);
      const at = this.order.findLastIndex((other) => other.time <= m.time) + 1;
      this.lines.insertBefore(m.line, this.order[at]?.line ?? null);
      this.order.splice(at, 0, m);
    }
    m.line.className = look(m);
    m.line.hidden = !this.shows(m);
    m.button.replaceChildren(this.when(m.time), el('i', { className: 'sign', ariaHidden: 'true' }),
      el('span', { className: 'words' }, ...this.words(m)));
    if (m.times && (m.detail || m.n > 1)) this.explain(m);
    this.changed = true;
  }

  shows(m) { return this.shown === 'all' || this.shown === m.kind; }
  when(time) { return el('time', { textContent: clock(time - this.start) }); }

  words(m) {
    return [
      m.first ? 'Began on ' : m.chosen ? 'Chose in ' : VERBS[m.kind],
      el(m.kind === 'event' ? 'code' : 'b', { textContent: m.text }), ' ',
      m.n > 1 && tag(`×${m.n}`, `${m.n} times`),
      m.rage && tag('rage click', 'Three times or more within a second'),
      m.dead && tag('dead click', 'Nothing changed for three seconds'),
      (m.title || m.kind === 'event') && el('small', { textContent: m.title || m.detail }),
    ].filter(Boolean);
  }

  // explain puts an error's stack below its line, and the times it came again.
  explain(m) {
    const again = m.times.slice(1, STACK_TIMES);
    m.stack ??= m.line.appendChild(el('details'));
    m.stack.replaceChildren(el('summary', { textContent: m.n > 1 ? 'Stack and times' : 'Stack' }),
      el('pre', { textContent: m.detail || 'No stack was sent.' }),
      ...again.map((time) => el('button', { onclick: () => this.go(time) }, this.when(time))));
  }

  filter(kind) {
    this.shown = kind;
    for (const button of this.filters.children) button.ariaPressed = button.value === kind;
    for (const m of this.order) m.line.hidden = !this.shows(m);
  }

  tally() {
    this.nothing.hidden = this.order.length > 0;
    for (const button of this.filters.children) {
      const sum = this.order.reduce((n, m) => n + (m.kind === button.value ? m.n ?? 1 : 0), 0);
      if (sum === 0) continue;
      button.hidden = false;
      write(button.lastChild, count(sum));
    }
  }

  // The play head.

  // head marks the line at the play head. The list does not move under a pointer
  // or the keyboard's focus.
  head(time) {
    const { changed, lines } = this;
    if (changed) this.tally();
    this.changed = false;
    const now = this.order.findLast((m) => m.time <= time && this.shows(m));
    if (now === this.now && !changed) return;
    this.now?.button.removeAttribute('aria-current');
    now?.button.setAttribute('aria-current', 'true');
    this.now = now;
    if (!now || lines.matches(':hover, :focus-within')) return;
    lines.scrollTop = now.line.offsetTop - lines.clientHeight / 3;
  }

  // step goes to the line after the play head, or to the one before. Lines so close
  // that the play head is at both are one step, or there would be no way back.
  step(by) {
    const lines = this.order.filter((m) => this.shows(m)), at = this.now?.time ?? -Infinity;
    const to = by > 0 ? lines.find((m) => m.time > at) : lines.findLast((m) => m.time < at - SAME_MS);
    if (to) this.go(to.time);
  }

  // at gives the newest moment of a kind that there is by a time.
  at(kind, time) {
    let found;
    for (const m of this.moments.values()) if (m.kind === kind && m.time <= time && !(m.time < found?.time)) found = m;
    return found;
  }

  // The time line.

  measure(start, length) {
    this.marks.style.setProperty('--length', length || 1);
    if (start === this.start) return;
    this.start = start;
    for (const m of [...this.moments.values()]) this.add(m);
  }

  mark(m) {
    m.mark ??= this.marks.appendChild(el('span', { onclick: () => this.go(m.time) }));
    m.mark.className = look(m);
    m.mark.title = `${clock(m.time - this.start)}  ${VERBS[m.kind] ?? ''}${m.text}`;
    m.mark.style.setProperty('--at', m.time - this.start);
    if (m.to) m.mark.style.setProperty('--for', m.to - m.time);
  }
}
