// A stored session as a player needs it: what it is, where its chunks lie, and
// its events from any index on. Times are milliseconds of the recorded page's
// clock, on a time line without its steps, everywhere in the player.

import { getJSON, patiently, request } from './api.js';
import { wellFormed } from './events.js';
import { FULL, META } from './story.js';
import { isDoubtful, Timeline } from './timeline.js';

const PAGE = 1000; // events in a page of what is not committed yet
const isFull = (e) => e?.type === FULL && wellFormed(e);

export class Recording {
  constructor(id, onWait) {
    this.path = `/sessions/${encodeURIComponent(id)}`;
    this.onWait = onWait;
    this.newestSnapshot = -1; // index of the newest full snapshot that is known
    this.timeline = new Timeline();
    this.chunks = []; // {fromIndex, count, startTime, endTime, …}
  }

  async load() {
    const read = (query) => patiently(() => getJSON(this.path + query), this.onWait);
    const info = await read(""), chunks = info.chunks ?? [];
    for (let more = info; more.moreChunks; chunks.push(...more.chunks)) {
      more = await read(`?chunksFrom=${chunks.at(-1).fromIndex + 1}`);
    }
    this.info = info;
    this.loaded = Date.now();
    this.isActive ??= info.isActive; // from then on the feed tells
    this.newestSnapshot = Math.max(this.newestSnapshot, info.snapshotIndex ?? -1);
    this.total = Math.max(this.total ?? 0, info.eventCount ?? 0);
    this.chunks = await this.placed(chunks);
    this.start = this.chunks[0]?.startTime ?? info.startTime ?? this.start ?? null;
    this.end = this.chunks.reduce((end, chunk) => Math.max(end, chunk.endTime ?? end), this.end ?? -Infinity);
    if (this.total > this.committed && info.endTime !== undefined) {
      this.end = Math.max(this.end, this.timeline.place(this.timeline.at(this.total), info.endTime));
    }
    return info;
  }

  // placed gives the chunks their places on the time line. It reads what is in
  // one only if its bounds say that the clock may have been set.
  async placed(chunks) {
    const placed = [...this.chunks]; // a stored chunk stays as it is
    for (let i = placed.length; i < chunks.length; i++) {
      const chunk = chunks[i];
      const bounds = [{ timestamp: chunk.startTime }, { timestamp: chunk.endTime }];
      const { events } = isDoubtful(chunk, chunks[i - 1], chunks[i + 1]) ? await this.readChunk(chunk, 0)
        : { events: this.timeline.take(chunk.fromIndex, bounds, chunk.count) };
      const times = events.map((e) => e?.timestamp).filter(Number.isFinite);
      placed.push({ ...chunk, startTime: times[0] ?? chunk.startTime, endTime: times.at(-1) ?? chunk.endTime });
    }
    return placed;
  }

  // The first index that is in no chunk yet.
  get committed() {
    const last = this.chunks.at(-1);
    return last ? last.fromIndex + last.count : 0;
  }

  // takeBatch takes a live batch's events to the time line, and what they say of
  // the session.
  takeBatch(from, events) {
    this.takeUncommitted(from, events);
    const snapshot = events.findLastIndex(isFull);
    this.total = Math.max(this.total, from + events.length);
    if (snapshot >= 0) this.newestSnapshot = from + snapshot;
  }

  // takeUncommitted takes events to the time line that no chunk tells of: the
  // session lasts until then, and begins there if nothing is known before.
  takeUncommitted(from, events) {
    this.timeline.take(from, events);
    const times = events.map((e) => e?.timestamp).filter(Number.isFinite);
    this.end = times.reduce((a, b) => Math.max(a, b), this.end);
    this.start ??= times[0] ?? null;
  }

  // read gives a piece of the session that begins at index, or behind a hole at
  // the next one there is: {from, events, next, bytes}. null: there is no more.
  async read(index) {
    if (index >= this.committed && Date.now() - this.loaded > 10000) await this.load();
    const chunk = this.chunks.find((c) => index < c.fromIndex + c.count);
    if (chunk) return this.readChunk(chunk, index);
    if (index >= this.total) return null;
    const page = await this.page(index, PAGE);
    return page.events.length > 0 ? page : null;
  }

  async page(index, limit) {
    const { body, bytes } = await this.fetch(`${this.path}/events?fromIndex=${index}&limit=${limit}`);
    const { fromIndex, events } = body;
    this.takeUncommitted(fromIndex, events);
    return { from: fromIndex, events, next: fromIndex + events.length, bytes };
  }

  async readChunk(chunk, index) {
    // A browser keeps chunks for a day: another session of the same id is not to be taken for this one.
    const version = Date.parse(this.info.createdAt);
    const { body, bytes } = await this.fetch(`${this.path}/chunks/${chunk.fromIndex}?of=${version}`);
    const from = Math.max(index, chunk.fromIndex);
    this.timeline.take(chunk.fromIndex, body);
    return { from, events: body.slice(from - chunk.fromIndex), next: chunk.fromIndex + chunk.count, bytes };
  }

  async fetch(path) {
    const text = await patiently(async () => (await request(path)).text(), this.onWait);
    return { body: JSON.parse(text), bytes: text.length };
  }

  // startBefore gives the piece that begins with the last full snapshot before
  // time; if there is none, with the first one after it; null: no snapshot at all.
  async startBefore(time) {
    const starts = this.chunks.filter((c) => c.snapshotIndex !== null)
      .map(({ fromIndex, startTime }) => ({ index: fromIndex, time: startTime }));
    const index = this.newestSnapshot;
    if (index >= this.committed) starts.push({ index, time: this.chunks.at(-1)?.endTime ?? time });
    for (let i = Math.max(0, starts.findLastIndex((s) => s.time <= time)); starts[i]; i--) {
      const piece = await this.fromSnapshot(starts[i].index, time, i === 0);
      if (piece) return piece;
    }
    return null;
  }

  // fromSnapshot begins a piece at its last full snapshot before time, or, if
  // any will do, at its first.
  async fromSnapshot(index, time, any) {
    const piece = await this.read(index);
    if (!piece) return null;
    let i = piece.events.findLastIndex((e) => isFull(e) && e.timestamp <= time);
    if (i < 0 && any) i = piece.events.findIndex(isFull);
    if (i < 0) return null;
    // The Meta event with the page's size stands right before it, maybe in another chunk.
    const before = i > 0 ? piece.events[i - 1] : piece.from > 0 && (await this.page(piece.from - 1, 1)).events[0];
    const meta = before?.type === META ? [before] : [];
    return { ...piece, from: piece.from + i, events: [...meta, ...piece.events.slice(i)] };
  }
}
