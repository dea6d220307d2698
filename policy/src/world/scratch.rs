//! Machines' drives: they are made larger while the host has disk for it, and never smaller, so that disk comes free when a
//! machine ends.

use std::sync::Arc;

use super::{ApplyError, HostRoom, TRIED, Touch, World};
use crate::{Amount, Machine, MachineId};

impl World {
    /// How much larger the drives of an account's machines may be made in all, in MiB.
    pub(crate) fn spare_disk(&self, account: &str) -> u32 {
        let held = self.held_disk.as_ref().filter(|(holder, _)| **holder != *account);
        let free = self.free().scratch_mib - held.map_or(0, |(_, mib)| i64::from(*mib));
        u32::try_from(free.max(0)).unwrap_or(u32::MAX)
    }

    /// What a machine of an account could give to containers if it had none, with its drive as large as it can be made now.
    pub(crate) fn reach(&self, machine: &Machine) -> Amount {
        let spare = machine.account.as_ref().map_or(0, |account| self.spare_disk(account));
        let mut reach = machine.capacity;
        reach.scratch_mib = reach.scratch_mib.saturating_add(machine.growth_mib.min(spare));
        reach
    }

    /// What it can still give.
    pub(crate) fn room(&self, machine: &Machine) -> Amount {
        self.reach(machine).minus(machine.allocated)
    }

    /// Whether a machine's drive may be made so large.
    pub(super) fn check_growth(&self, machine: &Machine, drive_mib: u32) -> Result<(), ApplyError> {
        let more = drive_mib.saturating_sub(machine.shape.drive_mib);
        let spare = machine.account.as_ref().map_or(0, |account| self.spare_disk(account));
        if more > machine.growth_mib {
            return Err(ApplyError::Room("room for a larger drive"));
        }
        if more > spare {
            return Err(ApplyError::Room("room on the host's disk"));
        }
        Ok(())
    }

    /// Makes a machine's drive so large, if it is not already. It may be.
    pub(super) fn grow(&mut self, id: MachineId, drive_mib: u32) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let more = drive_mib.saturating_sub(machine.shape.drive_mib);
        if more == 0 {
            return;
        }
        machine.shape.drive_mib = drive_mib;
        machine.capacity.scratch_mib += more;
        machine.growth_mib = machine.growth_mib.saturating_sub(more);
        let disk = HostRoom::of_disk(more);
        self.used = self.used.plus(disk);
        if let Some(account) = machine.account.as_ref().and_then(|name| self.accounts.get_mut(name)) {
            account.has = account.has.plus(disk);
            if let Some(group) = account.groups.get_mut(&machine.runtime)
                && group.gathering.is_none_or(|gathering| gathering.machine != id)
            {
                group.rooms.insert(machine.room(), id);
            }
        }
    }

    /// A request of an account found no place. Where there is less disk than it needs, the account is looked at again when
    /// there is more.
    pub(crate) fn found_no_place(&mut self, name: &Arc<str>, needs: Amount) {
        if needs.scratch_mib <= self.spare_disk(name) {
            return;
        }
        self.looks += 1;
        let order = self.looks;
        if let Some(account) = self
            .accounts
            .get_mut(name)
            .filter(|account| account.short_of_disk.is_none())
        {
            account.short_of_disk = Some(order);
            self.short_of_disk.insert((order, name.clone()));
        }
    }

    /// There is more disk: accounts that found too little are looked at, those that have waited longest since they last were.
    pub(crate) fn more_disk(&mut self) {
        for _ in 0..TRIED {
            let Some((_, name)) = self.short_of_disk.pop_first() else {
                return;
            };
            if let Some(account) = self.accounts.get_mut(&name) {
                account.short_of_disk = None;
            }
            self.touched.push_back(Touch::Slot(name));
        }
    }

    /// Keeps disk for the drive of a machine that comes once others have ended, or none any more.
    pub(crate) fn hold_disk(&mut self, held: Option<(Arc<str>, u32)>) {
        if self.held_disk == held {
            return;
        }
        let before = std::mem::replace(&mut self.held_disk, held);
        // For whom it was, or for others, there may be more now.
        if before.is_some() {
            self.more_disk();
        }
    }
}
