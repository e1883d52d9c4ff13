//! A vCPU that waits in a loop of PAUSE for another one, which may have no processor of the host's to run on.
//!
//! A processor leaves the guest then, for KVM to run another vCPU (PAUSE-loop exiting: Intel SDM volume 3, 26.1.3).

use crate::stats::{Set, vcpu as counter};
use crate::sys::host_tsc;

/// Two PAUSEs further apart are not of one loop. More than a processor's `ple_gap`: each is interpreted.
const GAP_CYCLES: u64 = 4096;
/// How long a loop may be: shorter than it takes the host to run another thread, longer than what most locks are held for.
const WINDOW_CYCLES: u64 = 20_000;

#[derive(Default)]
pub struct Spin {
    /// TSC at the loop's first PAUSE, and at the last one.
    since: u64,
    last: u64,
}

impl Spin {
    pub fn pause(&mut self, stats: &Set) {
        std::hint::spin_loop();
        let now = host_tsc();
        if now.wrapping_sub(self.last) > GAP_CYCLES {
            self.since = now;
        }
        self.last = now;
        if now.wrapping_sub(self.since) > WINDOW_CYCLES {
            stats.count(counter::SPIN_YIELDS);
            std::thread::yield_now();
            self.last = 0;
        }
    }
}
