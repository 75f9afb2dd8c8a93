// The time line of a recording. Clocks of recorded computers are set back and
// forward, and single events have times of their own: the order of events is
// that of their numbers, and steps of the clock are taken out. What follows one
// comes at the time of what was before it, and goes on from there.

const BACK_MS = 1000; // by so much events are mixed up without any fault
const AHEAD_MS = 7 * 24 * 3600_000; // more than that passes between no two events of a visit
const PAUSE_MS = 60_000; // a longer pause may be the clock, set right again

const isTime = (time) => Number.isFinite(time) && Math.abs(time) <= 8.64e15;

export class Timeline {
  constructor() {
    // What is known of the clock before the event at index: {index, time, shifts}.
    // time is that of the event before, on the time line; shifts are what the clock
    // lacks, first, and what it lacked earlier.
    this.states = [];
  }

  // at gives what is known of the clock before an event.
  at(index) {
    const known = this.states.findLast((s) => s.index <= index);
    return known ? { ...known, index, exact: known.index === index } : { index, time: null, shifts: [0] };
  }

  keep(state) {
    const before = this.states.findLastIndex((s) => s.index <= state.index);
    if (this.states[before]?.index !== state.index) this.states.splice(before + 1, 0, state);
  }

  // place gives a time its place on the time line, and moves the state there.
  place(state, time) {
    const before = state.time ?? time + state.shifts[0];
    const ahead = (shift) => time + shift - before;
    const fits = (shift) => ahead(shift) >= -BACK_MS && ahead(shift) <= AHEAD_MS;
    const [now] = state.shifts;
    if (!fits(now) || state.exact && ahead(now) > PAUSE_MS) {
      const shift = state.shifts.filter(fits).sort((a, b) => ahead(a) - ahead(b))[0] ?? before - time;
      state.shifts = [shift, ...state.shifts.filter((s) => s !== shift)].slice(0, 8);
    }
    state.exact = true;
    return state.time = Math.max(time + state.shifts[0], before);
  }

  // take puts events, the first of which is at index, in their places. They may stand
  // for count events.
  take(index, events, count = events.length) {
    const state = this.at(index);
    for (const e of events) if (isTime(e?.timestamp)) e.timestamp = this.place(state, e.timestamp);
    this.keep({ ...state, index: index + count });
    return events;
  }
}

// isDoubtful tells of a chunk, between two others, that the clock may have been
// set in it: its bounds overlap with theirs, or lie far apart.
export function isDoubtful(chunk, before, after) {
  const isBack = (a, b) => a && b && b.startTime < a.endTime - BACK_MS;
  return !before && !after || isBack(before, chunk) || isBack(chunk, after)
    || chunk.endTime - chunk.startTime > PAUSE_MS || before && chunk.startTime - before.endTime > AHEAD_MS;
}
