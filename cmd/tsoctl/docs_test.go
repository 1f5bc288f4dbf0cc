package main

import (
	"testing"

	"tsoagent/cmd/internal/commandtest"
)

func TestEveryFlagIsDocumented(t *testing.T) { commandtest.Documented(t, newApp()) }
