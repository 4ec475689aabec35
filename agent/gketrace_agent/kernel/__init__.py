"""The one place of the agent that touches the kernel: setns, netlink, subprocess, /proc.

Everything above (`gketrace_agent.observe`, `gketrace_agent.resolve`) gets bytes, messages and text
from here and turns them into the core's data.  Nothing here knows Kubernetes.

    hostpaths   where the host's /proc, /sys and /run are
    netns       opening a namespace, and running a function inside it in a thread of its own
    netlink     a netlink socket: dumps that notice NLM_F_DUMP_INTR, attributes, extended errors
    rtnetlink   requests and flat views of rtnetlink messages
    nfnetlink   nf_tables generation and tables, ipset names, netfilter hooks
    conntrack   one connection-tracking entry; and of whole tables
      conntrack_request, _dump, _events   what is asked, streamed, multicast
      conntrack_layout, _columns          messages of one layout, decoded together (NumPy)
      conntrack_stats                     the count, the limit, each CPU's statistics
    process     one subprocess or several side by side: bounded in time, output and stack
    reader      `KernelReader`: all of the above for one namespace, opened once and shared

Namespaces and threads: setns(2) changes the calling thread only.  `netns.run_in_netns` makes a
thread, enters, checks the inode of what it entered, runs one function and lets the thread die; no
pool thread ever changes namespace.  Sockets stay in the namespace they were opened in, so a
`KernelReader` made inside may be used afterwards from any thread.  Nothing here forks without
exec: subprocesses start by vfork and exec, from the namespace's thread, which they inherit.
"""
