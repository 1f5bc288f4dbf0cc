// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// keys tells when a TCP-MD5 or TCP-AO key is set, deleted or inherited, from the kernel's own key functions, after they succeeded. They
// run for keys only: no program is on the way of a packet, or of another socket option. One more tells when a socket that holds keys begins
// to listen or to connect, or ends; it runs for each change of a TCP socket's state. Which of them are attached is hook_linux.go's choice; a
// kernel needn't have them all.
//
// No key is read. Of what the user hands over with TCP_MD5SIG only the part ahead of the key is (struct tcp_md5sig up to tcpm_ifindex,
// linux/tcp.h), and only where tcp_md5_do_add can't be traced.

#include "kernel.h"

char _license[] SEC("license") = "GPL";

// As in decode.go.
enum op { ADDED = 1, DELETED = 2, INHERITED = 3, CLEARED = 4, STARTED = 6, CONNECTED = 7 };
enum kind { MD5 = 1, AO = 2 };

// struct key_event is a record. As in decode.go. family is 0 where the peer isn't known.
struct key_event {
	__u8 addr[16];
	__u64 cookie;
	__u32 netns;
	__s32 l3index;
	__u16 port;
	__u8 op;
	__u8 kind;
	__u8 family;
	__u8 prefixlen;
	__u16 reserved;
};

_Static_assert(sizeof(struct key_event) == 40, "decode.go knows it so");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} events SEC(".maps");

// lost counts the records that found the ring full.
__u64 lost;

static __always_inline struct key_event *reserve(struct sock *sk, __u8 kind, __u8 op)
{
	struct key_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	e->op = op;
	e->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	e->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	// skc_num is 0 again when a socket goes (inet_put_port), and inet_sport stays.
	e->port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	return e;
}

static __always_inline void peer(struct key_event *e, const void *addr, __u8 family, __u8 prefixlen, __s32 l3index)
{
	long err;

	if (family == AF_INET)
		err = bpf_probe_read_kernel(e->addr, 4, addr);
	else
		err = bpf_probe_read_kernel(e->addr, 16, addr);
	if (err)
		return;
	e->family = family;
	e->prefixlen = prefixlen;
	e->l3index = l3index;
}

// The last argument of a function that is traced is what it returned; newer kernels have other arguments after those that all have, so
// bpf_get_func_ret finds it.
static __always_inline bool failed(void *ctx)
{
	__u64 ret = 0;

	return bpf_get_func_ret(ctx, &ret) || (__s32)ret;
}

// md5 is for the functions that begin with (sk, addr, family, prefixlen, l3index).
static __always_inline int md5(__u64 *ctx, __u8 op)
{
	struct key_event *e;

	if (failed(ctx))
		return 0;
	e = reserve((void *)ctx[0], MD5, op);
	if (!e)
		return 0;
	peer(e, (void *)ctx[1], ctx[2], ctx[3], ctx[4]);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

// int tcp_md5_do_add(sk, addr, family, prefixlen, l3index, flags, newkey, newkeylen, and until 6.1 gfp)
SEC("fexit/tcp_md5_do_add")
int md5_add(__u64 *ctx)
{
	return md5(ctx, ADDED);
}

// int tcp_md5_do_del(sk, addr, family, prefixlen, l3index, flags)
SEC("fexit/tcp_md5_do_del")
int md5_del(__u64 *ctx)
{
	return md5(ctx, DELETED);
}

// int tcp_md5_key_copy(sk, addr, family, prefixlen, l3index, key): a connection that was accepted has its listener's key. Before 6.2
// that is a tcp_md5_do_add.
SEC("fexit/tcp_md5_key_copy")
int md5_copy(__u64 *ctx)
{
	return md5(ctx, INHERITED);
}

// void tcp_clear_md5_list(sk): a socket that held keys is gone. It isn't called for others.
SEC("fentry/tcp_clear_md5_list")
int md5_clear(__u64 *ctx)
{
	struct key_event *e = reserve((void *)ctx[0], MD5, CLEARED);

	if (e)
		bpf_ringbuf_submit(e, 0);
	return 0;
}

// What precedes the key in struct tcp_md5sig (linux/tcp.h).
struct md5sig {
	union {
		__u16 family;
		struct {
			__u16 family;
			__be16 port;
			__be32 addr;
		} v4;
		struct {
			__u16 family;
			__be16 port;
			__be32 flowinfo;
			__u8 addr[16];
		} v6;
		__u8 storage[128];
	};
	__u8 flags;
	__u8 prefixlen;
	__u16 keylen;
	__u32 ifindex;
};

#define TCP_MD5SIG_EXT 32
#define TCP_MD5SIG_FLAG_PREFIX 1
#define TCP_MD5SIG_FLAG_IFINDEX 2

static __always_inline int md5_option(void *ctx, struct sock *sk, int option, void *user)
{
	struct md5sig sig = {};
	struct key_event *e;
	bool known;
	bool v6;

	if (failed(ctx))
		return 0;
	known = !bpf_probe_read_user(&sig, sizeof(sig), user);
	e = reserve(sk, MD5, known && !sig.keylen ? DELETED : ADDED);
	if (!e)
		return 0;
	if (known) {
		v6 = sig.family == AF_INET6;
		e->family = v6 ? AF_INET6 : AF_INET;
		e->prefixlen = v6 ? 128 : 32;
		if (option == TCP_MD5SIG_EXT && (sig.flags & TCP_MD5SIG_FLAG_PREFIX))
			e->prefixlen = sig.prefixlen;
		else if (v6 && !*(__u64 *)sig.v6.addr && *(__u32 *)(sig.v6.addr + 8) == bpf_htonl(0xffff))
			e->prefixlen = 32;
		if (option == TCP_MD5SIG_EXT && (sig.flags & TCP_MD5SIG_FLAG_IFINDEX))
			e->l3index = sig.ifindex;
		if (v6)
			__builtin_memcpy(e->addr, sig.v6.addr, 16);
		else
			*(__be32 *)e->addr = sig.v4.addr;
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

// int tcp_v4_parse_md5_keys(sk, optname, optval, optlen), where optval is a sockptr_t, which takes two places. They stand in where
// tcp_md5_do_add has more arguments than the kernel's trampolines take (x86 before 6.6).
SEC("fexit/tcp_v4_parse_md5_keys")
int md5_option_v4(__u64 *ctx)
{
	return md5_option(ctx, (void *)ctx[0], ctx[1], (void *)ctx[2]);
}

SEC("fexit/tcp_v6_parse_md5_keys")
int md5_option_v6(__u64 *ctx)
{
	return md5_option(ctx, (void *)ctx[0], ctx[1], (void *)ctx[2]);
}

#define TCP_AO_ADD_KEY 38
#define TCP_AO_DEL_KEY 39

// int tcp_parse_ao(sk, cmd, family, optval, optlen). A new key is the first of the socket's list (tcp_ao_link_mkt); of one that was
// deleted only the socket is told.
SEC("fexit/tcp_parse_ao")
int ao_option(__u64 *ctx)
{
	struct tcp_sock *tp = (void *)ctx[0];
	struct tcp_ao_key *key;
	struct key_event *e;
	int cmd = ctx[1];

	if (failed(ctx) || (cmd != TCP_AO_ADD_KEY && cmd != TCP_AO_DEL_KEY))
		return 0;
	e = reserve((void *)ctx[0], AO, cmd == TCP_AO_ADD_KEY ? ADDED : DELETED);
	if (!e)
		return 0;
	if (cmd == TCP_AO_ADD_KEY && bpf_core_field_exists(tp->ao_info)) {
		key = (void *)BPF_CORE_READ(tp, ao_info, head.first);
		if (key)
			peer(e, __builtin_preserve_access_index(&key->addr), BPF_CORE_READ(key, family), BPF_CORE_READ(key, prefixlen),
			     BPF_CORE_READ(key, l3index));
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

// holds is the kind of the keys that a socket holds, MD5 for both and 0 for none.
static __always_inline __u8 holds(struct tcp_sock *tp)
{
	struct tcp_md5sig_info *md5;
	struct tcp_ao_info *ao;

	if (bpf_core_field_exists(tp->md5sig_info)) {
		md5 = tp->md5sig_info;
		if (md5 && md5->head.first)
			return MD5;
	}
	if (bpf_core_field_exists(tp->ao_info)) {
		ao = tp->ao_info;
		if (ao && BPF_CORE_READ(ao, head.first))
			return AO;
	}
	return 0;
}

// inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate): a socket is in the tables that are dumped from when it
// begins to listen or to connect, a moment after this, until it closes, a moment before. A connection that is established after this host
// began it is told once more: it is in the table by then for sure.
SEC("tp_btf/inet_sock_set_state")
int sock_state(__u64 *ctx)
{
	int before = ctx[1], state = ctx[2];
	struct tcp_sock *tp;
	struct key_event *e;
	__u8 kind, op;

	switch (state) {
	case TCP_LISTEN:
	case TCP_SYN_SENT:
		op = STARTED;
		break;
	case TCP_ESTABLISHED:
		op = before == TCP_SYN_RECV ? INHERITED : CONNECTED;
		break;
	case TCP_CLOSE:
		if (before == TCP_CLOSE)
			return 0; // it never was in a table
		op = CLEARED;
		break;
	default:
		return 0;
	}
	tp = bpf_skc_to_tcp_sock((void *)ctx[0]);
	if (!tp)
		return 0; // of another protocol
	kind = holds(tp);
	if (!kind)
		return 0;
	e = reserve((struct sock *)tp, kind, op);
	if (e)
		bpf_ringbuf_submit(e, 0);
	return 0;
}
