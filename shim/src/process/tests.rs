//! The machine keeps its promises for every sequence of inputs.

use std::collections::BTreeSet;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: UNIX_EPOCH,
    }
}

fn exec(id: &str) -> Who {
    Some(id.to_owned())
}

fn running() -> Container {
    let mut container = Container::created("c", 10);
    container.apply(Input::Start(None)).unwrap();
    container.apply(Input::Started(None, 10)).unwrap();
    container
}

#[test]
fn an_exit_during_start_is_announced_after_the_start() {
    let mut container = Container::created("c", 10);
    container.apply(Input::Start(None)).unwrap();
    let effects = container.apply(Input::Exited(None, exit(3))).unwrap();
    assert_eq!(effects, [Effect::InitGone { thaw: false }]);
    assert_eq!(container.status(None), Some(Status::Created));
    let effects = container.apply(Input::Started(None, 10)).unwrap();
    assert_eq!(
        effects,
        [Effect::Started(None, 10), Effect::Exited(None, 10, exit(3))]
    );
}

#[test]
fn the_exit_of_init_waits_for_its_execs() {
    let mut container = running();
    container.apply(Input::ExecAdd("e".into())).unwrap();
    container.apply(Input::Start(exec("e"))).unwrap();
    assert_eq!(
        container.apply(Input::Exited(None, exit(0))).unwrap(),
        [Effect::InitGone { thaw: false }]
    );
    assert_eq!(
        container.apply(Input::Started(exec("e"), 11)).unwrap(),
        [Effect::Started(exec("e"), 11)]
    );
    assert_eq!(
        container
            .apply(Input::Exited(exec("e"), exit(137)))
            .unwrap(),
        [
            Effect::Exited(exec("e"), 11, exit(137)),
            Effect::Exited(None, 10, exit(0))
        ]
    );
}

#[test]
fn nothing_starts_once_init_is_gone() {
    let mut container = running();
    container.apply(Input::ExecAdd("e".into())).unwrap();
    container.apply(Input::Exited(None, exit(0))).unwrap();
    let refusal = container.apply(Input::Start(exec("e"))).unwrap_err();
    assert_eq!(
        refusal,
        Refusal::State("container c init process is not running".into())
    );
    assert!(container.apply(Input::ExecAdd("f".into())).is_err());
}

#[test]
fn an_exec_is_registered_while_inits_exit_is_held_and_cannot_start() {
    let mut container = running();
    for id in ["e", "f"] {
        container.apply(Input::ExecAdd(id.into())).unwrap();
    }
    container.apply(Input::Start(exec("e"))).unwrap();
    container.apply(Input::Exited(None, exit(137))).unwrap();
    assert_eq!(container.status(None), Some(Status::Running));
    container.apply(Input::ExecAdd("g".into())).unwrap();
    assert!(container.apply(Input::Start(exec("g"))).is_err());
    let told = container.apply(Input::StartFailed(exec("e"), UNIX_EPOCH));
    assert_eq!(told.unwrap(), [Effect::Exited(None, 10, exit(137))]);
    assert!(container.apply(Input::ExecAdd("h".into())).is_err());
}

#[test]
fn a_failed_exec_start_leaves_it_created_and_answers_who_waits() {
    let mut container = running();
    container.apply(Input::ExecAdd("e".into())).unwrap();
    container.apply(Input::Start(exec("e"))).unwrap();
    assert_eq!(
        container
            .apply(Input::StartFailed(exec("e"), UNIX_EPOCH))
            .unwrap(),
        []
    );
    assert_eq!(container.status(Some("e")), Some(Status::Created));
    assert!(container.process(Some("e")).unwrap().exit.is_some());
    assert!(container.apply(Input::Start(exec("e"))).is_err());
    container.apply(Input::Delete(exec("e"))).unwrap();
}

#[test]
fn a_paused_container_that_dies_is_thawed() {
    let mut container = running();
    container.apply(Input::Pause).unwrap();
    assert_eq!(container.status(None), Some(Status::Pausing));
    assert_eq!(
        container.apply(Input::PauseDone { frozen: true }).unwrap(),
        [Effect::Paused]
    );
    let effects = container.apply(Input::Exited(None, exit(137))).unwrap();
    assert_eq!(
        effects,
        [
            Effect::InitGone { thaw: true },
            Effect::Exited(None, 10, exit(137))
        ]
    );
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![Just(None), Just(exec("a")), Just(exec("b"))]
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        prop_oneof![Just("a"), Just("b")].prop_map(|id| Input::ExecAdd(id.into())),
        who().prop_map(Input::Start),
        who().prop_map(|who| Input::Started(who, 7)),
        who().prop_map(|who| Input::StartFailed(who, UNIX_EPOCH)),
        (who(), 0..3u32).prop_map(|(who, status)| Input::Exited(who, exit(status))),
        Just(Input::Pause),
        any::<bool>().prop_map(|frozen| Input::PauseDone { frozen }),
        Just(Input::Resume),
        any::<bool>().prop_map(|thawed| Input::ResumeDone { thawed }),
        who().prop_map(Input::Delete),
    ]
}

/// What is known about one incarnation of a process from the effects alone.
#[derive(Default)]
struct Seen {
    started: BTreeSet<Who>,
    exited: BTreeSet<Who>,
}

proptest! {
    #[test]
    fn every_sequence_keeps_the_order_of_events(inputs in prop::collection::vec(input(), 0..60)) {
        let mut container = Container::created("c", 10);
        let mut seen = Seen::default();
        for input in inputs {
            let before = format!("{container:?}");
            let adds = if let Input::ExecAdd(id) = &input { Some(id.clone()) } else { None };
            let Ok(effects) = container.apply(input) else {
                prop_assert_eq!(before, format!("{:?}", container), "a refusal changed the state");
                continue;
            };
            if let Some(id) = adds {
                seen.started.remove(&Some(id.clone()));
                seen.exited.remove(&Some(id));
            }
            for effect in effects {
                match effect {
                    Effect::Started(who, _) => {
                        prop_assert!(!seen.exited.contains(&who), "start after exit");
                        prop_assert!(!seen.exited.contains(&None), "start after init's exit");
                        prop_assert!(seen.started.insert(who), "started twice");
                    }
                    Effect::Exited(who, _, exit) => {
                        prop_assert!(who.is_none() || seen.started.contains(&who));
                        prop_assert!(!seen.exited.contains(&None), "exit after init's");
                        let process = container.process(who.as_deref()).unwrap();
                        prop_assert_eq!(process.phase, Phase::Stopped);
                        prop_assert_eq!(process.exit, Some(exit));
                        if who.is_none() {
                            let idle = container
                                .execs()
                                .all(|(_, exec)| !matches!(exec.phase, Phase::Starting | Phase::Running));
                            prop_assert!(idle);
                        }
                        prop_assert!(seen.exited.insert(who), "exited twice");
                    }
                    Effect::ExecAdded(_) => prop_assert!(!seen.exited.contains(&None)),
                    Effect::InitGone { .. } | Effect::Paused | Effect::Resumed => {}
                }
            }
        }
    }
}
