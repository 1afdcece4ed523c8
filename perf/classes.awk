# Adds up folded stacks (ROLE;FRAME;...;FRAME COUNT) by what is done: lines `ROLE<tab>CLASS<tab>COUNT`.
#
# The first rule that fits a stack counts. Where copies happen, their leaf says so; a wake-up out of the network stack is
# a wake-up.
{
    count = $NF
    stack = $0
    sub(/ [0-9]+$/, "", stack)
    role = stack
    sub(/;.*/, "", role)
    leaf = stack
    sub(/.*;/, "", leaf)
    if (leaf ~ /copy_from_iter|copy_to_iter|rep_movs|copy_user|copyin|copyout/) class = "copy to or from the socket"
    else if (stack !~ /;(entry_|asm_|do_syscall|ret_from_fork)/) {
        if (stack ~ /pageferry::(memory|digest)|hash|zero/) class = "look at pages, note digests"
        else class = "other code of ours"
    } else if (stack ~ /page_fault/) class = "page faults"
    else if (stack ~ /try_to_wake_up|wake_up_q|ep_poll_callback|sock_def_readable|sock_def_write_space|sk_stream_write_space/) class = "wake others"
    else if (stack ~ /schedule|finish_task_switch|futex_wait|poll_schedule/) class = "go to sleep, switch"
    else if (stack ~ /alloc_skb|alloc_pages|page_frag_refill|free_unref|free_frozen|kfree_skb|skb_release|folio_put|kmem_cache/) class = "socket memory"
    else if (stack ~ /softirq/) class = "network, in soft interrupts"
    else if (stack ~ /sendmsg|recvmsg|recvfrom|sendto|tcp_|sock_/) class = "network, in the call"
    else class = "other code of the kernel"
    sum[role "\t" class] += count
}
END { for (key in sum) printf "%s\t%d\n", key, sum[key] }
