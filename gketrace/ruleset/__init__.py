"""Rules: iptables and nftables, parsed from what the kernel's tools print."""
