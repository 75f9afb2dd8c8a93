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

// What grows takes at most half of the budget, so that those who stall do not keep
// out the others; but one of them may always go on, beyond the half and the budget:
// they would wait for each other.
func TestBudgetGrow(t *testing.T) {
	inBudget(t, 100, func(b *budgetTest) {
		grow := func(owner *int, n int64) func(context.Context) error {
			return func(ctx context.Context) error { return b.grow(ctx, owner, n) }
		}
		ctx, one, two, three := context.Background(), new(int), new(int), new(int)
		b.wait(ctx, "one", grow(one, 40))
		b.check("within the half", 60, "one")
		b.wait(ctx, "two", grow(two, 30))
		b.check("two goes beyond the half", 30, "two")
		gone, leave := context.WithCancel(ctx)
		b.wait(gone, "three", grow(three, 1))
		b.wait(ctx, "one again", grow(one, 50))
		b.check("others wait", 30)
		b.wait(ctx, "two again", grow(two, 500))
		b.check("two is never waiting", -470, "two again")
		leave()
		b.check("three has gone", -470, "three gave up")
		b.finish(nil, 0, 530)
		b.check("two has handed over, and is not finished", -470)
		b.finish(two, 510, 0)
		b.check("it is now one's turn", -10, "one again")
		b.wait(ctx, "three", grow(three, 0))
		b.check("two at a time do not go beyond", -10)
		b.finish(one, 90, 90)
		b.check("all is finished", 80, "three")
	})
}
