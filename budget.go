package main

import (
	"context"
	"sync"
)

// budget bounds what clients can make the server hold. One is MAX_BUFFER_BYTES:
// what is received and not yet committed, the events kept in memory, and the
// sessions with their metadata. Readers take room before they read, and wait
// when there is none; TCP then makes the peer wait. The hub gives room back.
type budget struct {
	mu      sync.Mutex
	changed *sync.Cond
	// What is forced takes it below 0, too. Then only the owner in beyond is granted more.
	free    int64 // below 0 while one message goes beyond the bound
	growing int64 // taken by grow and not finished
	// The bound of growing, but for the owner in beyond.
	half      int64
	beyond    any // the owner that may take more; nil for none
	unbounded bool
}

// newBudget makes a budget of size bytes, all of them free.
func newBudget(size int64) *budget {
	b := &budget{free: size, half: size / 2}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// take waits for room for n bytes, which the caller gives back. It fails with ctx alone. n must be
// less than the whole: nobody but grow goes beyond.
func (b *budget) take(ctx context.Context, n int64) error {
	return b.wait(ctx, func() bool {
		if !b.unbounded && b.free < n {
			return false
		}
		b.free -= n
		return true
	})
}

// grow takes room for n bytes more of what owner, a pointer, makes or reads. What
// grows holds room while it waits for more, and so could several wait for each
// other without end: therefore all of them take half of the budget at most, and
// one at a time goes beyond both bounds, until its owner has finished.
func (b *budget) grow(ctx context.Context, owner any, n int64) error {
	return b.wait(ctx, func() bool {
		switch {
		case b.unbounded, b.beyond == owner, b.free >= n && b.growing+n <= b.half:
		case b.beyond == nil && b.free >= 0 && b.growing <= b.half:
			b.beyond = owner
		default:
			return false
		}
		b.free -= n
		b.growing += n
		return true
	})
}

// wait returns when try has succeeded, or with ctx.
func (b *budget) wait(ctx context.Context, try func() bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if try() {
		return nil
	}
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.changed.Broadcast()
	})
	defer stop()
	for !try() {
		if err := ctx.Err(); err != nil {
			return err
		}
		b.changed.Wait()
	}
	return nil
}

// force takes room without waiting, also where there is none.
func (b *budget) force(n int64) { b.finish(nil, -n, 0) }

// give gives room back.
func (b *budget) give(n int64) { b.finish(nil, n, 0) }

// finish gives n bytes back, and counts grown bytes as growing no longer. With an owner
// it ends that one's right to go beyond.
func (b *budget) finish(owner any, n, grown int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.growing -= grown
	if owner != nil && b.beyond == owner {
		b.beyond = nil
	}
	b.changed.Broadcast()
}

// left is the room that is free.
func (b *budget) left() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.free
}

// open lets everyone through: the server stops, and what was read is to be stored.
func (b *budget) open() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unbounded = true
	b.changed.Broadcast()
}
