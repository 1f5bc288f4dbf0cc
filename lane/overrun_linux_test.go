package lane

import (
	"context"
	"testing"
	"time"
)

// TestOverrunIsAboutEachDevice has the kernel drop notifications while the watcher waits.
func TestOverrunIsAboutEachDevice(t *testing.T) {
	inNS(t)
	w, err := Watch()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.conn.SetReadBuffer(1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	waits, goOn, lost := make(chan struct{}, 1), make(chan struct{}), make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(nic int32) {
			select {
			case waits <- struct{}{}:
				<-goOn
			default:
			}
			if nic == 0 {
				select {
				case lost <- struct{}{}:
				default:
				}
			}
		})
	}()
	run(t, "tc qdisc add dev nic clsact")
	<-waits
	waits <- struct{}{} // it does not wait again
	for range 50 {
		run(t, "tc qdisc del dev nic clsact")
		run(t, "tc qdisc add dev nic clsact")
	}
	close(goOn)
	select {
	case <-lost:
	case <-time.After(30 * time.Second):
		t.Error("nothing tells that events were lost")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
