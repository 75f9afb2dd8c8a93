package main

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
)

// budgetTest has waiters for room; each says when it is through.
type budgetTest struct {
	*testing.T
	*budget
	through chan string
}

func inBudget(t *testing.T, size int64, test func(*budgetTest)) {
	synctest.Test(t, func(t *testing.T) { test(&budgetTest{t, newBudget(size), make(chan string, 9)}) })
}

func (b *budgetTest) wait(ctx context.Context, name string, take func(context.Context) error) {
	go func() { // ends when it has room, or with ctx
		if take(ctx) != nil {
			name += " gave up"
		}
		b.through <- name
	}()
	synctest.Wait()
}

func (b *budgetTest) check(when string, free int64, want ...string) {
	b.Helper()
	synctest.Wait()
	var got []string
	for len(b.through) > 0 {
		got = append(got, <-b.through)
	}
	if slices.Sort(got); !slices.Equal(got, want) || b.left() != free {
		b.Errorf("%s: got %q through, %d free, want %q, %d", when, got, b.left(), want, free)
	}
}

func TestBudget(t *testing.T) {
	inBudget(t, 100, func(b *budgetTest) {
		take := func(n int64) func(context.Context) error {
			return func(ctx context.Context) error { return b.take(ctx, n) }
		}
		ctx := context.Background()
		b.wait(ctx, "a", take(60))
		b.check("room", 40, "a")
		b.wait(ctx, "b", take(50))
		gone, leave := context.WithCancel(ctx)
		b.wait(gone, "c", take(70))
		b.check("no room", 40)
		leave()
		b.check("one gives up", 40, "c gave up")
		b.give(9)
		b.check("not enough", 49)
		b.give(1)
		b.check("enough", 0, "b")
		b.wait(ctx, "d", take(200))
		b.open() // the server stops: nobody waits for room any more
		b.check("open", -200, "d")
	})
}

// Messages of which a part is read take at most half of the budget, so that
// those who stall do not keep out the others; but one of them may always go on,
// beyond the half and the budget: they would wait for each other.
func TestBudgetGrow(t *testing.T) {
	inBudget(t, 100, func(b *budgetTest) {
		grow := func(n, most int64) func(context.Context) error {
			return func(ctx context.Context) error {
				took, err := b.grow(ctx, n, most)
				if err == nil && took != n && took != most {
					b.Errorf("grow %d of %d: took %d", n, most, took)
				}
				return err
			}
		}
		ctx := context.Background()
		b.wait(ctx, "a", grow(40, 1000))
		b.check("within the half", 60, "a")
		b.wait(ctx, "b", grow(40, 30))
		b.check("beyond the half, but no more than it may need", 30, "b")
		gone, leave := context.WithCancel(ctx)
		b.wait(gone, "c", grow(10, 500))
		b.wait(ctx, "d", grow(10, 500))
		b.check("others are beyond the half", 30)
		leave()
		b.wait(ctx, "e", func(ctx context.Context) error { return b.take(ctx, 30) })
		b.check("who begins a message need not wait for those who grow", 0, "c gave up", "e")
		b.finish(0, 30)
		b.check("one message is whole", -500, "d")
		b.wait(ctx, "f", func(ctx context.Context) error { return b.take(ctx, 1) })
		b.give(500)
		b.check("no room yet", 0)
		b.give(101)
		b.check("room", 100, "f")
	})
}
