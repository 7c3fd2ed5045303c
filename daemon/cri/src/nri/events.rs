//! What plugins are told and asked, event by event, in the order of their indexes.

use std::sync::Arc;

use futures::future::join_all;
use lighter_proto::nri::pkg::api::v1alpha1::{
    Container, ContainerUpdate, CreateContainerRequest, CreateContainerResponse, Event,
    LinuxResources, PluginInstance, PodSandbox, PostCreateContainerRequest,
    PostStartContainerRequest, PostUpdateContainerRequest, PostUpdatePodSandboxRequest,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopContainerResponse, StopPodSandboxRequest, UpdateContainerRequest,
    UpdateContainerResponse, UpdatePodSandboxRequest, UpdatePodSandboxResponse,
    ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
};

use super::merge::{self, Merge};
use super::plugin::Plugin;
use super::{Created, Error, Nri, Updated};

/// An event with a pod, or with a pod and a container, that has no answer.
macro_rules! notification {
    ($(#[$doc:meta])* $name:ident, $event:ident, $request:ident, pod) => {
        $(#[$doc])*
        pub async fn $name(&self, pod: &PodSandbox) -> Result<(), Error> {
            for plugin in self.plugins() {
                let request = $request { pod: Some(pod.clone()) };
                let old = || (Some(pod.clone()), None);
                let method = method_of(Event::$event);
                plugin.notify(Event::$event, method, &request, old, &self.metrics).await?;
            }
            Ok(())
        }
    };
    ($(#[$doc:meta])* $name:ident, $event:ident, $request:ident, container) => {
        $(#[$doc])*
        pub async fn $name(&self, pod: &PodSandbox, container: &Container) -> Result<(), Error> {
            for plugin in self.plugins() {
                let (pod, container) = (Some(pod.clone()), Some(container.clone()));
                let request = $request { pod: pod.clone(), container: container.clone() };
                let method = method_of(Event::$event);
                let old = || (pod, container);
                plugin.notify(Event::$event, method, &request, old, &self.metrics).await?;
            }
            Ok(())
        }
    };
}

impl Nri {
    notification! {
        /// A pod is about to become visible.
        ///
        /// # Errors
        /// A plugin's refusal, which fails the request.
        run_pod_sandbox, RunPodSandbox, RunPodSandboxRequest, pod
    }
    notification! {
        /// A pod has been stopped. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        stop_pod_sandbox, StopPodSandbox, StopPodSandboxRequest, pod
    }
    notification! {
        /// A pod is being removed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        remove_pod_sandbox, RemovePodSandbox, RemovePodSandboxRequest, pod
    }
    notification! {
        /// A pod's resources have been changed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_update_pod_sandbox, PostUpdatePodSandbox, PostUpdatePodSandboxRequest, pod
    }
    notification! {
        /// A container has been created. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_create_container, PostCreateContainer, PostCreateContainerRequest, container
    }
    notification! {
        /// A container is about to be started.
        ///
        /// # Errors
        /// A plugin's refusal, which fails the request.
        start_container, StartContainer, StartContainerRequest, container
    }
    notification! {
        /// A container has been started. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_start_container, PostStartContainer, PostStartContainerRequest, container
    }
    notification! {
        /// A container has been updated. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_update_container, PostUpdateContainer, PostUpdateContainerRequest, container
    }
    notification! {
        /// A container is being removed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        remove_container, RemoveContainer, RemoveContainerRequest, container
    }

    /// A pod's resources are about to be changed.
    ///
    /// # Errors
    /// A plugin's refusal, which fails the request.
    pub async fn update_pod_sandbox(
        &self,
        pod: &PodSandbox,
        overhead: Option<&LinuxResources>,
        resources: Option<&LinuxResources>,
    ) -> Result<(), Error> {
        let request = UpdatePodSandboxRequest {
            pod: Some(pod.clone()),
            overhead_linux_resources: overhead.cloned(),
            linux_resources: resources.cloned(),
        };
        let event = Event::UpdatePodSandbox;
        for plugin in self.plugins() {
            let _: Option<UpdatePodSandboxResponse> = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
        }
        Ok(())
    }

    /// A container is about to be created. Returns what the plugins want, accepted by every
    /// validator.
    ///
    /// # Errors
    /// A plugin's refusal, two plugins in conflict, or a validator's rejection.
    pub async fn create_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Created, Error> {
        let plugins = self.plugins();
        if plugins.is_empty() && !self.config.default_validator.enable {
            return Ok(Created::default());
        }
        let event = Event::CreateContainer;
        let mut merge = Merge::create(container.clone());
        for plugin in &plugins {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(merge.container.clone()),
            };
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            let Some(CreateContainerResponse {
                adjust,
                update,
                evict,
            }) = answer
            else {
                continue;
            };
            if let Some(adjust) = adjust {
                merge.adjust(&plugin.name, adjust)?;
            }
            merge.update(&plugin.name, update)?;
            merge.evictions.extend(evict);
        }
        self.validate(&plugins, pod, container, &merge).await?;
        Ok(Created {
            adjust: merge.adjust,
            updates: merge.updates,
            evictions: merge.evictions,
        })
    }

    async fn validate(
        &self,
        plugins: &[Arc<Plugin>],
        pod: &PodSandbox,
        container: &Container,
        merge: &Merge,
    ) -> Result<(), Error> {
        let instances: Vec<PluginInstance> = plugins.iter().map(|p| p.instance()).collect();
        let own = &self.config.default_validator;
        own.check(pod, container, &merge.owners, &instances)?;
        let event = Event::ValidateContainerAdjustment;
        if !plugins.iter().any(|plugin| plugin.wants(event)) {
            return Ok(());
        }
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
            adjust: Some(merge.adjust.clone()),
            update: merge.updates.clone(),
            owners: Some(merge.owners.message()),
            plugins: instances,
        };
        let ask = async |plugin: &Arc<Plugin>| {
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            match answer {
                Some(ValidateContainerAdjustmentResponse {
                    reject: true,
                    reason,
                }) => Err(Error::Rejected {
                    plugin: plugin.name.clone(),
                    reason,
                }),
                _ => Ok(()),
            }
        };
        join_all(plugins.iter().map(ask))
            .await
            .into_iter()
            .collect()
    }

    /// A container's resources are about to be changed.
    ///
    /// # Errors
    /// A plugin's refusal, or two plugins in conflict.
    pub async fn update_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: &LinuxResources,
    ) -> Result<Updated, Error> {
        let event = Event::UpdateContainer;
        let mut merge = Merge::change();
        let mut wanted = resources.clone();
        for plugin in self.plugins() {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(wanted.clone()),
            };
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            let Some(UpdateContainerResponse { update, evict }) = answer else {
                continue;
            };
            merge.update(&plugin.name, update)?;
            merge.evictions.extend(evict);
            let own = merge
                .updates
                .iter()
                .find(|u| u.container_id == container.id);
            if let Some(own) = own.and_then(|u| u.linux.as_ref()?.resources.as_ref()) {
                merge::overlay(&mut wanted, own);
            }
        }
        let (own, updates) = merge
            .updates
            .into_iter()
            .partition::<Vec<_>, _>(|update| update.container_id == container.id);
        Ok(Updated {
            resources: (!own.is_empty()).then_some(wanted),
            updates,
            evictions: merge.evictions,
        })
    }

    /// A container has been stopped. Returns changes to other containers. Failures are for logging
    /// only.
    ///
    /// # Errors
    /// The first plugin's, or two plugins in conflict.
    pub async fn stop_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Vec<ContainerUpdate>, Error> {
        let event = Event::StopContainer;
        let mut merge = Merge::change();
        for plugin in self.plugins() {
            let request = StopContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
            };
            let answer: Option<StopContainerResponse> = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            if let Some(answer) = answer {
                merge.update(&plugin.name, answer.update)?;
            }
        }
        Ok(merge.updates)
    }
}

/// The RPC of an event.
fn method_of(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => "",
    }
}
