//! Two network namespaces joined by veth. Nothing of them has a name: they are gone when nobody is in them any more, and
//! whoever holds one ends with this process, however that ends.

use std::process::{Child, Command, Stdio};

use crate::program::{self, PAGEFERRY, Program};

/// A network namespace, held by a process that waits for the end of its standard input.
struct Namespace(Child);

impl Namespace {
    fn new() -> Namespace {
        let mut command = Command::new("unshare");
        // It becomes `cat`: its standard input ends with this process, even if that is killed.
        command.args(["--net", "sh", "-c", "echo; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().unwrap();
        // When it speaks, it is in.
        let mut line = [0];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).unwrap();
        let namespace = Namespace(holder);
        namespace.run("ip link set lo up");
        namespace
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid()));
        command
    }

    /// Runs a command of the shell in it, and gives what that prints.
    fn run(&self, script: &str) -> String {
        let output = self.enter().args(["sh", "-c", script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {}: {said}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Where source and target are, and the links between them.
pub struct Network {
    source: Namespace,
    target: Namespace,
}

impl Network {
    /// What this machine lacks for it.
    pub fn lacks() -> Option<String> {
        let script = "for tool in ip nft nsenter; do command -v $tool || { echo \"no $tool\" >&2; exit 1; }; done; \
                      ip link add here0 type veth peer name there0 && nft add table inet t";
        match Command::new("unshare").args(["--net", "sh", "-c", script]).output() {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(format!("no network of its own: {}", String::from_utf8_lossy(&output.stderr))),
            Err(why) => Some(format!("no unshare: {why}")),
        }
    }

    /// A network of so many links.
    pub fn new(links: u32) -> Network {
        let network = Network { source: Namespace::new(), target: Namespace::new() };
        for link in 0..links {
            let far = network.target.pid();
            network.source.run(&format!(
                "ip link add s{link} type veth peer name t{link} netns {far}; \
                 ip addr add 10.77.{link}.1/24 dev s{link}; ip link set s{link} up"
            ));
            network.target.run(&format!("ip addr add 10.77.{link}.2/24 dev t{link}; ip link set t{link} up"));
        }
        for end in [&network.source, &network.target] {
            end.run("nft add table inet chaos; nft 'add chain inet chaos in { type filter hook input priority 0; }'");
        }
        network
    }

    /// Loses so many of a hundred packets, at both ends.
    pub fn lose(&self, percent: u32) {
        let which = if percent < 100 { format!("numgen random mod 100 '<' {percent}") } else { String::new() };
        for end in [&self.source, &self.target] {
            end.run(&format!("nft add rule inet chaos in meta l4proto tcp {which} counter drop"));
        }
    }

    /// Loses no more; gives how many it has lost since it began to.
    pub fn lose_none(&self) -> u64 {
        let lost = [&self.source, &self.target].map(|end| {
            let rules = end.run("nft list chain inet chaos in; nft flush chain inet chaos in");
            let counters = rules.split("counter packets ").skip(1);
            counters.map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
        });
        lost.iter().sum()
    }

    /// Pulls the plug of a link at the source, or puts it back.
    pub fn plug(&self, link: u32, up: bool) {
        self.source.run(&format!("ip link set s{link} {}", if up { "up" } else { "down" }));
    }

    pub fn at_source(&self, arguments: &[&str]) -> Program {
        let mut command = self.source.enter();
        command.arg(PAGEFERRY).args(arguments);
        program::launch(command)
    }

    pub fn at_target(&self, arguments: &[&str]) -> Program {
        let mut command = self.target.enter();
        command.arg(PAGEFERRY).args(arguments);
        program::launch(command)
    }
}
