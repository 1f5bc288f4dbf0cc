package sockbpf

// The compiler is named, since its version decides the bytes: Debian 12's clang-14 and llvm-14, with the headers of its libbpf-dev.
// TestObjectsAreReproducible compares.

//go:generate go tool -modfile=../../tools/go.mod bpf2go -cc clang-14 -strip llvm-strip-14 -tags linux -no-global-types -cflags "-mcpu=v3 -O2 -g -Wall -Wextra -Werror" conns bpf/conns.c
//go:generate go tool -modfile=../../tools/go.mod bpf2go -cc clang-14 -strip llvm-strip-14 -tags linux -no-global-types -cflags "-mcpu=v3 -O2 -g -Wall -Wextra -Werror" keys bpf/keys.c
//go:generate go tool -modfile=../../tools/go.mod bpf2go -cc clang-14 -strip llvm-strip-14 -tags linux -no-global-types -cflags "-mcpu=v3 -O2 -g -Wall -Wextra -Werror" held bpf/held.c
