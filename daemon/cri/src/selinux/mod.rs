//! SELinux labels of pods and containers, and the categories that keep them apart.
//!
//! A pod gets the policy's labels for containers with two categories that no other pod has; its
//! containers share them unless they name a level of their own. Whoever holds [`Labels`] holds the
//! level: it is free again once the last holder is gone. Labels are on record as `ProcessLabel`, and
//! held anew after a restart.
//!
//! Without `enable_selinux`, or where the kernel has no SELinux, labels are empty and what requests ask
//! is passed over. Spec: selinux(8), `lxc_contexts`. Upstream: opencontainers/selinux.

mod context;
mod policy;
mod relabel;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lighter_proto::runtime::v1::SeLinuxOption;
use lighter_snapshotter::Mount;
use rand::Rng as _;
use serde_json::{Value, json};

use self::context::Context;
use self::policy::Policy;
use crate::config;
use crate::error::{Error, Result};

pub use self::policy::Places;
pub(crate) use self::relabel::relabel;

/// Categories there are when the configuration names no number, and most it may name.
const CATEGORIES: u32 = 1024;
/// Level of files that no container may touch: never given away.
const RESERVED: &str = "s0:c1022,c1023";
/// Random pairs tried before all of them are looked through.
const TRIES: u32 = 64;
/// What the type of a runtime holds whose containers are virtual machines.
const VIRTUAL_MACHINES: &str = "io.containerd.kata";

/// Levels that are taken, with the number of their holders.
type Levels = Mutex<HashMap<String, usize>>;

fn locked(levels: &Levels) -> MutexGuard<'_, HashMap<String, usize>> {
    levels.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A level, held until this is dropped.
#[derive(Debug)]
struct Hold {
    levels: Arc<Levels>,
    level: String,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut levels = locked(&self.levels);
        if let Some(holders) = levels.get_mut(&self.level) {
            *holders -= 1;
            if *holders == 0 {
                levels.remove(&self.level);
            }
        }
    }
}

/// Labels of a pod or container; empty where there are none. Its level is held as long as this lives.
#[derive(Debug, Default)]
pub struct Labels {
    process: String,
    mount: String,
    _hold: Option<Hold>,
}

impl Labels {
    /// Label of its processes, as it is on record. A privileged one has it on record only.
    #[must_use]
    pub fn process(&self) -> &str {
        &self.process
    }

    /// Label of its files.
    #[must_use]
    pub fn mount(&self) -> &str {
        &self.mount
    }

    /// Puts the labels into a spec. What its base says of labels does not stay: it would be the same for
    /// all.
    pub(crate) fn put(&self, spec: &mut Value, process: Option<&str>) {
        for (part, key, label) in [
            ("process", "selinuxLabel", process.unwrap_or_default()),
            ("linux", "mountLabel", self.mount.as_str()),
        ] {
            if label.is_empty() {
                if let Some(part) = spec[part].as_object_mut() {
                    part.remove(key);
                }
            } else {
                spec[part][key] = json!(label);
            }
        }
    }
}

/// What is known of SELinux on this machine, and which levels are taken.
#[derive(Debug, Default)]
pub(crate) struct Selinux {
    /// `None` where no labels are given.
    policy: Option<Policy>,
    /// Categories to choose from.
    categories: u32,
    levels: Arc<Levels>,
}

/// The level that a request names, if its form is right.
fn level(asked: &SeLinuxOption) -> Result<&str> {
    if context::is_level(&asked.level) {
        Ok(&asked.level)
    } else {
        Err(Error::unknown(format!(
            "the format of 'level' {:?} is not correct",
            asked.level
        )))
    }
}

/// Checks the other parts of a label: each is one word of it.
fn check_words(asked: &SeLinuxOption) -> Result<()> {
    for (name, word) in [
        ("user", &asked.user),
        ("role", &asked.role),
        ("type", &asked.r#type),
    ] {
        if !context::is_word(word) {
            return Err(Error::invalid(format!(
                "failed to init selinux options: the format of '{name}' {word:?} is not correct"
            )));
        }
    }
    Ok(())
}

impl Selinux {
    /// What the configuration wants and the machine has.
    ///
    /// # Errors
    /// For a number of categories that cannot be.
    pub(crate) fn new(runtime: &config::Runtime, places: &Places) -> Result<Self> {
        if !runtime.enable_selinux {
            return Ok(Self::default());
        }
        let categories = match runtime.selinux_category_range {
            0 => CATEGORIES,
            1 => {
                return Err(Error::invalid(
                    "selinux_category_range: a pod takes 2 categories, but there is 1",
                ));
            }
            range if range > CATEGORIES => {
                return Err(Error::invalid(format!(
                    "selinux_category_range: can't have more than {CATEGORIES} categories, got {range}"
                )));
            }
            range => range,
        };
        if !places.are_enabled() {
            tracing::warn!(
                "Selinux is not supported: enable_selinux has no effect on this machine"
            );
            return Ok(Self::default());
        }
        Ok(Self::with(Policy::read(places), categories))
    }

    fn with(policy: Policy, categories: u32) -> Self {
        if policy.process.is_none() {
            tracing::warn!(
                "the SELinux policy names no label of containers: install container-selinux"
            );
        }
        let levels = HashMap::from([(RESERVED.to_owned(), 1)]);
        Self {
            policy: Some(policy),
            categories,
            levels: Arc::new(Mutex::new(levels)),
        }
    }

    /// Whether labels are given.
    pub(crate) fn is_enabled(&self) -> bool {
        self.policy.is_some()
    }

    /// Labels of a pod, or of a container in a pod of label `pod`: what is asked, else what the pod has,
    /// else the policy's.
    ///
    /// # Errors
    /// For words that are no part of a label, and when all categories are taken.
    pub(crate) fn labels(
        &self,
        asked: Option<&SeLinuxOption>,
        pod: Option<&str>,
    ) -> Result<Labels> {
        let nothing = SeLinuxOption::default();
        let asked = asked.unwrap_or(&nothing);
        let own_level = level(asked)?;
        let Some(policy) = &self.policy else {
            return Ok(Labels::default());
        };
        check_words(asked)?;
        let (Some(process), Some(file)) = (&policy.process, &policy.file) else {
            return Ok(Labels {
                mount: policy
                    .file
                    .as_ref()
                    .map(Context::to_string)
                    .unwrap_or_default(),
                ..Labels::default()
            });
        };
        let (mut process, mut file) = (process.clone(), file.clone());
        let has_level = !process.level.is_empty();
        let of_pod = pod.and_then(Context::parse);
        if *asked == nothing
            && let Some(of_pod) = &of_pod
        {
            file.user.clone_from(&of_pod.user);
            process = of_pod.clone();
        }
        for (part, word) in [
            (&mut process.role, &asked.role),
            (&mut process.kind, &asked.r#type),
            (&mut process.user, &asked.user),
            (&mut file.user, &asked.user),
        ] {
            if !word.is_empty() {
                part.clone_from(word);
            }
        }
        let shared = of_pod.map(|of_pod| of_pod.level).unwrap_or_default();
        let hold = if let Some(level) = [own_level, shared.as_str()]
            .into_iter()
            .find(|l| !l.is_empty())
        {
            process.level = level.to_owned();
            file.level = level.to_owned();
            self.hold(level)
        } else if has_level {
            let hold = self.allocate()?;
            process.level.clone_from(&hold.level);
            file.level.clone_from(&hold.level);
            Some(hold)
        } else {
            None
        };
        Ok(Labels {
            process: process.to_string(),
            mount: file.to_string(),
            _hold: hold,
        })
    }

    /// Labels of an earlier run, as they are on record: what they hold is held again.
    pub(crate) fn recorded(&self, process: &str) -> Labels {
        let context = Context::parse(process);
        let file = self.policy.as_ref().and_then(|policy| policy.file.clone());
        let mount = context.as_ref().zip(file).map(|(context, file)| Context {
            user: context.user.clone(),
            level: context.level.clone(),
            ..file
        });
        Labels {
            process: process.to_owned(),
            mount: mount.map(|mount| mount.to_string()).unwrap_or_default(),
            _hold: context.and_then(|context| self.hold(&context.level)),
        }
    }

    /// The label that processes of a container run with; `None` for none.
    pub(crate) fn of_processes(
        &self,
        labels: &Labels,
        privileged: bool,
        runtime_type: &str,
    ) -> Option<String> {
        if privileged || labels.process.is_empty() {
            return None;
        }
        let machine = self
            .policy
            .as_ref()
            .and_then(|p| p.virtual_machine.as_ref());
        if let Some(machine) = machine.filter(|_| runtime_type.contains(VIRTUAL_MACHINES))
            && let Some(mut context) = Context::parse(&labels.process)
        {
            context.kind.clone_from(&machine.kind);
            return Some(context.to_string());
        }
        Some(labels.process.clone())
    }

    /// Holds a level for one more; `None` for one without categories, which sets nobody apart.
    fn hold(&self, level: &str) -> Option<Hold> {
        if self.policy.is_none() || !level.contains(":c") {
            return None;
        }
        *locked(&self.levels).entry(level.to_owned()).or_insert(0) += 1;
        Some(Hold {
            levels: Arc::clone(&self.levels),
            level: level.to_owned(),
        })
    }

    /// Holds two categories that nobody has.
    fn allocate(&self) -> Result<Hold> {
        let mut levels = locked(&self.levels);
        let name = |low: u32, high: u32| format!("s0:c{low},c{high}");
        let mut random = rand::rng();
        let tried = (0..TRIES).find_map(|_| {
            let one = random.random_range(0..self.categories);
            let other = random.random_range(0..self.categories);
            let level = name(one.min(other), one.max(other));
            (one != other && !levels.contains_key(&level)).then_some(level)
        });
        let free = tried.or_else(|| {
            let mut all =
                (1..self.categories).flat_map(|high| (0..high).map(move |low| (low, high)));
            all.find_map(|(low, high)| {
                let level = name(low, high);
                (!levels.contains_key(&level)).then_some(level)
            })
        });
        let Some(level) = free else {
            return Err(Error::unknown(format!(
                "no SELinux categories are free: raise selinux_category_range above {}",
                self.categories
            )));
        };
        levels.insert(level.clone(), 1);
        Ok(Hold {
            levels: Arc::clone(&self.levels),
            level,
        })
    }
}

/// Has the files of a root filesystem seen with `label`. A bind takes no label: what is below it keeps
/// its own. Where an overlay is what is seen, the layers below it take none either: other pods may have
/// the same ones mounted, and the kernel gives a file system one label.
pub(crate) fn label_mounts(mounts: &mut [Mount], label: &str) {
    if label.is_empty() {
        return;
    }
    let stacked = mounts.iter().any(|mount| mount.kind() == "overlay");
    for mount in mounts {
        let bind = |option: &String| option == "bind" || option == "rbind";
        let below = stacked && mount.kind() != "overlay";
        if !below && mount.fstype != "bind" && !mount.options.iter().any(bind) {
            mount.options.push(format!("context=\"{label}\""));
        }
    }
}

/// What of a spec's mounts gets the container's label: the volumes that are asked for so, and what lies
/// in `own`, the directories of the container and its pod.
pub(crate) fn to_relabel(spec: &Value, asked: &[&str], own: &[PathBuf]) -> Vec<PathBuf> {
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let binds = mounts.filter(|mount| mount["type"] == "bind");
    let wanted = binds.filter_map(|mount| {
        let source = PathBuf::from(mount["source"].as_str()?);
        let destination = mount["destination"].as_str()?;
        let ours = own.iter().any(|dir| source.starts_with(dir));
        (ours || asked.contains(&destination)).then_some(source)
    });
    let mut paths: Vec<_> = wanted.collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

#[cfg(test)]
mod tests;
