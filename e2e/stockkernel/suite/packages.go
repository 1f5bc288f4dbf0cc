package suite

// Packages are those whose tests run on stock kernels, too: all of their tests, since the host's kernel may lack what they are about.
// User-mode Linux has no BPF tracing, and not every guest lets its kernel's functions be traced.
var Packages = []string{"sockopt/sockbpf", "wire"}
